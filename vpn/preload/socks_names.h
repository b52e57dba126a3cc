/* Part of socks.c: names. The forwarder is asked. The gateway resolves them for it; where there is only a SOCKS5 server, which
 * has no way to, the answer is an address that stands for the name (198.18.0.0/15, RFC 2544: no host's), the same in every
 * process of the session: connect() to it is a connection to the name. Names of this node (/etc/hosts, localhost, its own) and addresses in
 * digits go to the C library. The C library's own getaddrinfo builds every result, so freeaddrinfo is its own as well.
 */
#include <stdalign.h>

#define NAME_LIMIT 255

#define ADDRESS_LIMIT 16

struct name_answer {
	int32_t status; /* 0 or an EAI_… */
	unsigned char addresses[ADDRESS_LIMIT][16];
};

/* --- which names are the node's own --- */

static int is_same_name(const char *one, size_t length, const char *other)
{
	if (length > 0 && one[length - 1] == '.') {
		length--;
	}
	return strlen(other) == length && strncasecmp(one, other, length) == 0;
}

static int is_in_hosts(const char *name, size_t length)
{
	FILE *file = fopen("/etc/hosts", "re");
	char line[4096], *rest, *word;
	int found = 0;

	if (file == NULL) {
		return 0;
	}
	while (!found && fgets(line, sizeof(line), file) != NULL) {
		line[strcspn(line, "#\n")] = '\0';
		if (strtok_r(line, " \t", &rest) == NULL) {
			continue;
		}
		while (!found && (word = strtok_r(NULL, " \t", &rest)) != NULL) {
			found = is_same_name(name, length, word);
		}
	}
	(void)fclose(file);
	return found;
}

static int is_remote_name(const char *name)
{
	static const char local[] = "localhost";
	size_t length = name == NULL ? 0 : strlen(name);
	char own[256] = "";
	struct in_addr digits;

	if (session[0] == '\0' || length == 0 || length > NAME_LIMIT || strchr(name, ':') != NULL ||
	    inet_aton(name, &digits) != 0) {
		return 0;
	}
	(void)gethostname(own, sizeof(own) - 1);
	if (is_same_name(name, length, local) || is_same_name(name, length, own)) {
		return 0;
	}
	if (length > sizeof(local) && name[length - sizeof(local)] == '.' &&
	    strcasecmp(name + length - sizeof(local) + 1, local) == 0) {
		return 0;
	}
	return !is_in_hosts(name, length);
}

/* --- names to addresses --- */

/* The addresses of a name, as many as are returned; or an EAI_…, which are negative. */
static int look_up(const char *name, struct name_answer *answer)
{
	char request[NAME_LIMIT + 2];
	size_t length = strlen(name);
	ssize_t size;

	request[0] = 'N';
	memcpy(request + 1, name, length);
	size = ask(request, length + 1, answer, sizeof(*answer), NULL);
	if (size < (ssize_t)sizeof(answer->status)) {
		return EAI_AGAIN;
	}
	return answer->status != 0 ? answer->status : (int)((size_t)size - sizeof(answer->status)) / 16;
}

/* Whether an address will do where this family is wanted, and in which family. An address that stands for a name is good for
 * both; an IPv4 address is good for IPv6 where mapped ones were asked for. */
static int family_of(const unsigned char *address, int wanted, int with_mapped)
{
	int family = is_mapped(address) ? AF_INET : AF_INET6;

	if (wanted == AF_UNSPEC || wanted == family) {
		return family;
	}
	if (wanted == AF_INET6 && (with_mapped || (address[12] == 198 && (address[13] & 0xfe) == 18))) {
		return AF_INET6;
	}
	return -1;
}

static int add_address(const unsigned char *address, int family, const char *service, const struct addrinfo *hints,
		       struct addrinfo ***end)
{
	char digits[INET6_ADDRSTRLEN];
	struct addrinfo wanted = *hints;
	int status;

	(void)inet_ntop(family, family == AF_INET ? address + 12 : address, digits, sizeof(digits));
	wanted.ai_family = family;
	wanted.ai_flags = (hints->ai_flags & ~(AI_CANONNAME | AI_ADDRCONFIG | AI_V4MAPPED | AI_ALL)) | AI_NUMERICHOST;
	status = REAL(getaddrinfo)(digits, service, &wanted, *end);
	while (status == 0 && **end != NULL) {
		*end = &(**end)->ai_next;
	}
	return status;
}

EXPORTED int getaddrinfo(const char *__restrict name, const char *__restrict service, const struct addrinfo *__restrict hints,
			 struct addrinfo **__restrict result)
{
	struct addrinfo wanted = {0}, *found = NULL, **end = &found;
	struct name_answer answer;
	int count, i, family, status = EAI_NONAME;

	if (hints != NULL) {
		wanted = *hints;
	}
	if ((wanted.ai_flags & AI_NUMERICHOST) || !is_remote_name(name)) {
		return REAL(getaddrinfo)(name, service, hints, result);
	}
	count = look_up(name, &answer);
	if (count < 0) {
		return count;
	}
	for (i = 0; i < count; i++) {
		family = family_of(answer.addresses[i], wanted.ai_family, wanted.ai_flags & AI_V4MAPPED);
		if (family != -1 && (status = add_address(answer.addresses[i], family, service, &wanted, &end)) != 0) {
			break;
		}
	}
	if (found == NULL) {
		return status;
	}
	if (wanted.ai_flags & AI_CANONNAME) {
		found->ai_canonname = strdup(name);
	}
	*result = found;
	return 0;
}

/* A hostent in the caller's buffer (gethostbyname_r(3)), of addresses of one size, 16 bytes apart; ERANGE when it is too
 * small. */
static int make_host(const char *name, const unsigned char *from, int count, int size, struct hostent *host, char *buffer,
		     size_t length, struct hostent **result, int *problem)
{
	struct layout {
		char *aliases[1];
		char *list[ADDRESS_LIMIT + 1];
		unsigned char addresses[ADDRESS_LIMIT][16];
		char name[];
	} *layout;
	size_t skip = -(uintptr_t)buffer & (alignof(struct layout) - 1);
	int i;

	*result = NULL;
	if (length < skip + sizeof(*layout) + strlen(name) + 1) {
		h_errno = *problem = NETDB_INTERNAL;
		return ERANGE;
	}
	layout = (void *)(buffer + skip);
	layout->aliases[0] = NULL;
	for (i = 0; i < count; i++) {
		memcpy(layout->addresses[i], from + (ptrdiff_t)i * 16, (size_t)size);
		layout->list[i] = (char *)layout->addresses[i];
	}
	layout->list[count] = NULL;
	strcpy(layout->name, name);
	*host = (struct hostent){layout->name, layout->aliases, size == 4 ? AF_INET : AF_INET6, size, layout->list};
	*result = host;
	*problem = NETDB_SUCCESS;
	return 0;
}

EXPORTED int gethostbyname2_r(const char *__restrict name, int family, struct hostent *__restrict host, char *__restrict buffer,
			      size_t length, struct hostent **__restrict result, int *__restrict problem)
{
	struct name_answer answer;
	unsigned char good[ADDRESS_LIMIT][16];
	int count, i, kept = 0, size = family == AF_INET ? 4 : 16;

	if (!is_remote_name(name)) {
		return REAL(gethostbyname2_r)(name, family, host, buffer, length, result, problem);
	}
	count = look_up(name, &answer);
	for (i = 0; i < count; i++) {
		if (family_of(answer.addresses[i], family, 0) == family) {
			memcpy(good[kept++], answer.addresses[i] + 16 - size, (size_t)size);
		}
	}
	if (kept == 0) {
		*result = NULL;
		h_errno = *problem = count == EAI_AGAIN ? TRY_AGAIN : HOST_NOT_FOUND;
		return count == EAI_AGAIN ? EAGAIN : 0;
	}
	return make_host(name, good[0], kept, size, host, buffer, length, result, problem);
}

EXPORTED int gethostbyname_r(const char *__restrict name, struct hostent *__restrict host, char *__restrict buffer, size_t length,
			     struct hostent **__restrict result, int *__restrict problem)
{
	if (!is_remote_name(name)) {
		return REAL(gethostbyname_r)(name, host, buffer, length, result, problem);
	}
	return gethostbyname2_r(name, AF_INET, host, buffer, length, result, problem);
}

static __thread struct hostent own_host;
static __thread char own_buffer[sizeof(void *) * (ADDRESS_LIMIT + 4) + ADDRESS_LIMIT * 16 + NAME_LIMIT + 1];

EXPORTED struct hostent *gethostbyname2(const char *name, int family)
{
	struct hostent *result;

	if (!is_remote_name(name)) {
		return REAL(gethostbyname2)(name, family);
	}
	(void)gethostbyname2_r(name, family, &own_host, own_buffer, sizeof(own_buffer), &result, &h_errno);
	return result;
}

EXPORTED struct hostent *gethostbyname(const char *name)
{
	return is_remote_name(name) ? gethostbyname2(name, AF_INET) : REAL(gethostbyname)(name);
}

/* --- addresses to names --- */

/* The name an address stands for: 1, or 0 for an address that is asked about elsewhere, or -1 when nobody here knows. */
static int name_of(const struct destination *of, char *name)
{
	unsigned char request[17] = {'R'};
	char answer[NAME_LIMIT + 1]; /* a status, and the name without its end */
	const struct table *known;
	ssize_t size;

	if (session[0] == '\0' || is_loopback(of) || (known = get_table()) == NULL || is_direct(known, of)) {
		return 0;
	}
	memcpy(request + 1, of->address, 16);
	size = ask(request, sizeof(request), answer, sizeof(answer), NULL);
	if (size <= 1) {
		return -1; /* an address of the outside: the node's own name servers are no better and may be slow */
	}
	memcpy(name, answer + 1, (size_t)size - 1);
	name[size - 1] = '\0';
	return 1;
}

EXPORTED int getnameinfo(const struct sockaddr *__restrict address, socklen_t length, char *__restrict host, socklen_t host_size,
			 char *__restrict service, socklen_t service_size, int flags)
{
	char name[NAME_LIMIT + 2];
	struct destination of;
	int found;

	if (host == NULL || host_size == 0 || (flags & NI_NUMERICHOST) || !parse_address(address, length, &of)) {
		found = 0;
	} else {
		found = name_of(&of, name);
	}
	if (found <= 0) {
		if (found < 0 && (flags & NI_NAMEREQD)) {
			return EAI_NONAME;
		}
		return REAL(getnameinfo)(address, length, host, host_size, service, service_size,
					 flags | (found < 0 ? NI_NUMERICHOST : 0));
	}
	if (strlen(name) >= host_size) {
		return EAI_OVERFLOW;
	}
	strcpy(host, name);
	return service == NULL || service_size == 0 ? 0 : REAL(getnameinfo)(address, length, NULL, 0, service, service_size, flags);
}

/* name_of for the addresses gethostbyaddr takes. */
static int name_of_bytes(const void *address, socklen_t length, int family, char *name)
{
	struct destination of = {.port = 0};

	memcpy(of.address, mapped, sizeof(mapped));
	if (address == NULL || !((family == AF_INET && length == 4) || (family == AF_INET6 && length == 16))) {
		return 0;
	}
	memcpy(of.address + (family == AF_INET ? 12 : 0), address, length);
	return name_of(&of, name);
}

EXPORTED int gethostbyaddr_r(const void *__restrict address, socklen_t length, int family, struct hostent *__restrict host,
			     char *__restrict buffer, size_t size, struct hostent **__restrict result, int *__restrict problem)
{
	char name[NAME_LIMIT + 2];
	int found = name_of_bytes(address, length, family, name);

	if (found == 0) {
		return REAL(gethostbyaddr_r)(address, length, family, host, buffer, size, result, problem);
	}
	if (found < 0) {
		*result = NULL;
		h_errno = *problem = HOST_NOT_FOUND; /* some callers of this read the other one */
		return 0;
	}
	return make_host(name, address, 1, (int)length, host, buffer, size, result, problem);
}

EXPORTED struct hostent *gethostbyaddr(const void *address, socklen_t length, int family)
{
	char name[NAME_LIMIT + 2];
	int found = name_of_bytes(address, length, family, name);
	struct hostent *result = NULL;

	if (found == 0) {
		return REAL(gethostbyaddr)(address, length, family);
	}
	h_errno = HOST_NOT_FOUND;
	if (found > 0) {
		(void)make_host(name, address, 1, (int)length, &own_host, own_buffer, sizeof(own_buffer), &result, &h_errno);
	}
	return result;
}

/* Everything is resolved before the program has threads. */
static void resolve_all(void)
{
	(void)REAL(connect), (void)REAL(getpeername), (void)REAL(getsockopt), (void)REAL(sendto), (void)REAL(sendmsg);
	(void)REAL(sendmmsg), (void)REAL(execve), (void)REAL(execvpe), (void)REAL(fexecve), (void)REAL(posix_spawn);
	(void)REAL(posix_spawnp), (void)REAL(system), (void)REAL(popen), (void)REAL(getaddrinfo), (void)REAL(getnameinfo);
	(void)REAL(gethostbyname), (void)REAL(gethostbyname2), (void)REAL(gethostbyname_r), (void)REAL(gethostbyname2_r);
	(void)REAL(gethostbyaddr), (void)REAL(gethostbyaddr_r);
}
