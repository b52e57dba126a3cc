/* Part of socks.c: names. They are resolved where the connection is made, beyond the gateway, so here a name becomes an
 * address that stands for it (198.18.0.0/15, RFC 2544: no host's), given by the forwarder and the same in every process of the
 * session; connect() to it is a connection to the name. Names of this node (/etc/hosts, localhost, its own) and addresses in
 * digits go to the C library. The C library's own getaddrinfo builds every result, so freeaddrinfo is its own as well.
 */
#include <stdalign.h>

#define NAME_LIMIT 255

struct name_answer {
	int32_t status; /* 0 or an EAI_… */
	unsigned char address[4];
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

/* The address that stands for a name, in digits; 0 or an EAI_…. */
static int look_up(const char *name, char *digits)
{
	char request[NAME_LIMIT + 2];
	struct name_answer answer = {.status = EAI_AGAIN};
	size_t length = strlen(name);

	request[0] = 'N';
	memcpy(request + 1, name, length);
	if (ask(request, length + 1, &answer, sizeof(answer), NULL) != sizeof(answer)) {
		return EAI_AGAIN;
	}
	if (answer.status == 0) {
		(void)inet_ntop(AF_INET, answer.address, digits, INET_ADDRSTRLEN);
	}
	return answer.status;
}

EXPORTED int getaddrinfo(const char *__restrict name, const char *__restrict service, const struct addrinfo *__restrict hints,
			 struct addrinfo **__restrict result)
{
	struct addrinfo wanted = {0};
	char digits[sizeof("::ffff:") + INET_ADDRSTRLEN] = "::ffff:";
	const size_t prefix = sizeof("::ffff:") - 1;
	int flags, status;

	if (hints != NULL) {
		wanted = *hints;
	}
	flags = wanted.ai_flags;
	if ((flags & AI_NUMERICHOST) || !is_remote_name(name)) {
		return REAL(getaddrinfo)(name, service, hints, result);
	}
	status = look_up(name, digits + prefix);
	if (status != 0) {
		return status;
	}
	wanted.ai_flags = (flags & ~(AI_CANONNAME | AI_ADDRCONFIG)) | AI_NUMERICHOST;
	status = REAL(getaddrinfo)(wanted.ai_family == AF_INET6 ? digits : digits + prefix, service, &wanted, result);
	if (status == 0 && (flags & AI_CANONNAME)) {
		(*result)->ai_canonname = strdup(name);
	}
	return status;
}

/* A hostent in the caller's buffer (gethostbyname_r(3)); ERANGE when it is too small. */
static int make_host(const char *name, const unsigned char *address, int size, struct hostent *host, char *buffer, size_t length,
		     struct hostent **result, int *problem)
{
	struct layout {
		char *aliases[1];
		char *addresses[2];
		unsigned char address[16];
		char name[];
	} *layout;
	size_t skip = -(uintptr_t)buffer & (alignof(struct layout) - 1);

	*result = NULL;
	if (length < skip + sizeof(*layout) + strlen(name) + 1) {
		*problem = NETDB_INTERNAL;
		return ERANGE;
	}
	layout = (void *)(buffer + skip);
	layout->aliases[0] = NULL;
	layout->addresses[0] = (char *)layout->address;
	layout->addresses[1] = NULL;
	memcpy(layout->address, address, (size_t)size);
	strcpy(layout->name, name);
	*host = (struct hostent){layout->name, layout->aliases, size == 4 ? AF_INET : AF_INET6, size, layout->addresses};
	*result = host;
	*problem = NETDB_SUCCESS;
	return 0;
}

EXPORTED int gethostbyname2_r(const char *__restrict name, int family, struct hostent *__restrict host, char *__restrict buffer,
			      size_t length, struct hostent **__restrict result, int *__restrict problem)
{
	unsigned char address[16];
	char digits[INET_ADDRSTRLEN];
	int status;

	if (!is_remote_name(name)) {
		return REAL(gethostbyname2_r)(name, family, host, buffer, length, result, problem);
	}
	status = look_up(name, digits);
	if (status != 0) {
		*result = NULL;
		h_errno = *problem = status == EAI_AGAIN ? TRY_AGAIN : HOST_NOT_FOUND;
		return status == EAI_AGAIN ? EAGAIN : 0;
	}
	memcpy(address, mapped, sizeof(mapped));
	(void)inet_pton(AF_INET, digits, address + 12);
	return make_host(name, family == AF_INET ? address + 12 : address, family == AF_INET ? 4 : 16, host, buffer, length, result,
			 problem);
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
static __thread char own_buffer[sizeof(void *) * 8 + NAME_LIMIT + 1];

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
	return make_host(name, address, (int)length, host, buffer, size, result, problem);
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
		(void)make_host(name, address, (int)length, &own_host, own_buffer, sizeof(own_buffer), &result, &h_errno);
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
