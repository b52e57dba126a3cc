/* Part of socks.c: addresses, which of them go through the session, and the entries of sockets that did. */

struct destination {
	unsigned char address[16];
	uint16_t port;
};

static const unsigned char mapped[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};

static int is_mapped(const unsigned char *address)
{
	return memcmp(address, mapped, sizeof(mapped)) == 0;
}

/* An IP address as one IPv6 address and a port; 0 for any other family, and for what is too short for its own. */
static int parse_address(const struct sockaddr *address, socklen_t length, struct destination *to)
{
	const struct sockaddr_in *four = (const void *)address;
	const struct sockaddr_in6 *six = (const void *)address;

	if (address == NULL || length < sizeof(address->sa_family)) {
		return 0;
	}
	if (address->sa_family == AF_INET && length >= sizeof(*four)) {
		memcpy(to->address, mapped, sizeof(mapped));
		memcpy(to->address + 12, &four->sin_addr, 4);
		to->port = ntohs(four->sin_port);
		return 1;
	}
	if (address->sa_family == AF_INET6 && length >= offsetof(struct sockaddr_in6, sin6_scope_id)) {
		memcpy(to->address, &six->sin6_addr, 16);
		to->port = ntohs(six->sin6_port);
		return 1;
	}
	return 0;
}

static socklen_t write_address(const struct destination *from, int family, struct sockaddr_storage *to)
{
	struct sockaddr_in *four = (void *)to;
	struct sockaddr_in6 *six = (void *)to;

	memset(to, 0, sizeof(*to));
	if (family == AF_INET) {
		four->sin_family = AF_INET;
		four->sin_port = htons(from->port);
		memcpy(&four->sin_addr, from->address + 12, 4);
		return sizeof(*four);
	}
	six->sin6_family = AF_INET6;
	six->sin6_port = htons(from->port);
	memcpy(&six->sin6_addr, from->address, 16);
	return sizeof(*six);
}

static int is_within(const unsigned char *address, const struct network *network)
{
	unsigned whole = network->bits / 8, rest = network->bits % 8;

	if (memcmp(address, network->address, whole) != 0) {
		return 0;
	}
	return rest == 0 || ((address[whole] ^ network->address[whole]) & (0xffu << (8 - rest)) & 0xffu) == 0;
}

/* Addresses reached without the session: the list has loopback, the node's own, and what the user named. */
static int is_direct(const struct table *known, const struct destination *to)
{
	uint32_t i;

	for (i = 0; i < known->header.direct_count && i < DIRECT_LIMIT; i++) {
		if (is_within(to->address, &known->header.direct[i])) {
			return 1;
		}
	}
	return 0;
}

/* Loopback needs no table: programs may still talk among themselves when the session is gone. */
static int is_loopback(const struct destination *to)
{
	static const unsigned char one[16] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1}, any[16];

	return (is_mapped(to->address) && (to->address[12] == 127 || memcmp(to->address + 12, any, 4) == 0)) ||
	       memcmp(to->address, one, 16) == 0 || memcmp(to->address, any, 16) == 0;
}

enum way { PASS, TUNNEL, REFUSE };

static int option(int fd, int level, int name)
{
	int value = -1;
	socklen_t size = sizeof(value);

	return REAL(getsockopt)(fd, level, name, &value, &size) == 0 ? value : -1;
}

/* What to do with a socket that is to send to this address. REFUSE sets errno. */
static enum way way_of(int fd, const struct sockaddr *address, socklen_t length, struct destination *to)
{
	const struct table *known;
	int before = errno;
	enum way way = PASS;

	if (session[0] == '\0' || !parse_address(address, length, to) || is_loopback(to)) {
		return PASS;
	}
	/* The kernel has the better errno for what is no socket, or of another family. */
	if (option(fd, SOL_SOCKET, SO_DOMAIN) == address->sa_family) {
		known = get_table();
		if (known == NULL) {
			return REFUSE;
		}
		if (!is_direct(known, to)) {
			way = option(fd, SOL_SOCKET, SO_TYPE) == SOCK_STREAM && option(fd, SOL_SOCKET, SO_PROTOCOL) == IPPROTO_TCP
				      ? TUNNEL
				      : REFUSE;
		}
	}
	errno = way == REFUSE ? ENETUNREACH : before;
	return way;
}

/* The entry of a socket that went through the gate, or NULL. */
static const struct entry *entry_of(int fd)
{
	const struct table *known = __atomic_load_n(&table, __ATOMIC_ACQUIRE);
	const struct entry *entry = NULL;
	struct sockaddr_storage local;
	struct destination own;
	struct stat status;
	socklen_t size = sizeof(local);
	int before = errno;

	if (session[0] != '\0' && getsockname(fd, (struct sockaddr *)&local, &size) == 0 &&
	    parse_address((struct sockaddr *)&local, size, &own) && fstat(fd, &status) == 0 &&
	    (known != NULL || (known = get_table()) != NULL)) {
		entry = &known->entries[!is_mapped(own.address)][own.port];
		if (entry->inode != (uint64_t)status.st_ino) {
			entry = NULL;
		}
	}
	errno = before;
	return entry;
}

/* The errno of a connection the forwarder could not make; 0 when there is none. */
static int refusal_of(int fd)
{
	const struct entry *entry = entry_of(fd);
	int outcome = entry == NULL ? 0 : __atomic_load_n(&entry->outcome, __ATOMIC_ACQUIRE);

	return outcome > 0 ? outcome : 0;
}
