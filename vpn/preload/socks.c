/* Programs reach the outside through a session of this node, without any namespace.
 *
 * Why: some sites forbid user namespaces. A program that calls the C library for its connections can be served anyway.
 *
 * How: the session's forwarder (vpn/shim/forwarder.py) keeps a TCP port on loopback, the *gate*, that never answers: its
 * queue is full, so the kernel drops what arrives. connect() to the outside connects the program's own socket to the gate
 * and tells the forwarder, over an abstract UNIX socket, which destination was meant. The socket stays "in progress" as long
 * as the forwarder is busy reaching it. Then the forwarder connects *from the gate to the program's port*: a simultaneous
 * open (RFC 9293, 3.5), which completes the program's connect(). So blocking and non-blocking connects, poll, select,
 * epoll (edge-triggered as well), time limits and signals behave as ever, because the kernel's own socket does it all; nobody
 * else can use the gate, because it accepts nothing.
 *
 * What is kept where: nothing in this library but addresses of functions and one shared mapping, read-only, written by
 * the forwarder: for each local port the socket's inode, the destination asked for, and the outcome. A socket is recognised
 * by its local port and inode. So fork, exec, dup, threads and descriptors sent elsewhere need no care.
 *
 * What cannot be seen: io_uring and system calls made without the C library. Programs that make these (static ones, Go) or
 * to which LD_PRELOAD does not apply (setuid, other machines) are refused at exec: socks_exec.h. Names: socks_names.h.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define VARIABLE "VPN_SHIM"
#define MAGIC 0x314b5356u /* "VSK1" */
#define HEADER_SIZE 4096u
#define DIRECT_LIMIT 128u
#define ANSWER_SECONDS 60
#define PENDING (-1)

/* The mapping, as vpn/shim/table.py writes it. An address is IPv6, or IPv4 mapped into it; ports are in host order. */
struct network {
	unsigned char address[16];
	uint32_t bits;
};

struct header {
	uint32_t magic;
	uint16_t gate4, gate6; /* the gate's ports on 127.0.0.1 and ::1; gate6 is 0 where there is no IPv6 */
	uint32_t direct_count;
	struct network direct[DIRECT_LIMIT];
};

struct entry {
	uint64_t inode;
	unsigned char address[16];
	uint16_t port;
	uint16_t unused;
	int32_t outcome; /* PENDING, 0 (through), or an errno */
};

struct table {
	struct header header;
	char fill[HEADER_SIZE - sizeof(struct header)];
	struct entry entries[2][65536]; /* by the gate's family and the local port */
};

/* What is asked of the forwarder, one packet each way; see vpn/shim/requests.py. */
struct connect_request {
	char kind; /* 'C' */
	unsigned char six;
	uint16_t port;
	uint64_t inode;
	unsigned char local[16], address[16];
	uint16_t local_port;
	uint16_t unused[3];
};

static char self[4096];     /* this library's path */
static char session[64];    /* the forwarder's abstract socket; empty: this library does nothing */
static struct table *table; /* mapped at the first need */

static void *resolve(const char *name)
{
	void *symbol = dlsym(RTLD_NEXT, name);

	if (symbol == NULL) {
		fprintf(stderr, "vpn: the C library has no %s\n", name);
		abort();
	}
	return symbol;
}

/* POSIX guarantees that a data pointer from dlsym holds a function; ISO C has no cast for it. Resolving twice at once is
 * harmless; nothing is resolved later than in the constructor unless another library's constructor comes first. */
#define REAL(name)                                                                                                             \
	({                                                                                                                     \
		static __typeof__(&name) real_;                                                                                \
		__typeof__(&name) found_ = __atomic_load_n(&real_, __ATOMIC_ACQUIRE);                                          \
		if (found_ == NULL) {                                                                                          \
			*(void **)&found_ = resolve(#name);                                                                    \
			__atomic_store_n(&real_, found_, __ATOMIC_RELEASE);                                                    \
		}                                                                                                              \
		found_;                                                                                                        \
	})

#define EXPORTED __attribute__((visibility("default")))

/* --- the forwarder --- */

static int open_session(void)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	struct timeval limit = {.tv_sec = ANSWER_SECONDS};
	struct ucred peer = {0};
	socklen_t size = sizeof(peer);
	size_t length = strlen(session);
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

	if (fd == -1) {
		return -1;
	}
	memcpy(address.sun_path + 1, session, length);
	(void)setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
	(void)setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));
	length += offsetof(struct sockaddr_un, sun_path) + 1;
	while (REAL(connect)(fd, (struct sockaddr *)&address, (socklen_t)length) == -1) {
		if (errno != EINTR) {
			goto refused;
		}
	}
	/* Anybody may take the name of a session that has ended. */
	if (REAL(getsockopt)(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) == -1 || peer.uid != geteuid()) {
		goto refused;
	}
	return fd;
refused:
	(void)close(fd);
	errno = ENETDOWN;
	return -1;
}

/* Send a request and receive its answer and, into `passed` unless it is NULL, a descriptor. The answer's size, or -1. */
static ssize_t ask(const void *request, size_t length, void *answer, size_t limit, int *passed)
{
	union {
		struct cmsghdr header;
		char space[CMSG_SPACE(sizeof(int))];
	} control;
	struct iovec part = {.iov_base = answer, .iov_len = limit};
	struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
	struct cmsghdr *header;
	ssize_t size;
	int fd = open_session();

	if (fd == -1) {
		return -1;
	}
	if (passed != NULL) {
		message.msg_control = control.space;
		message.msg_controllen = sizeof(control.space);
	}
	do {
		size = REAL(sendto)(fd, request, length, MSG_NOSIGNAL, NULL, 0);
	} while (size == -1 && errno == EINTR);
	if (size != -1) {
		do {
			size = recvmsg(fd, &message, MSG_CMSG_CLOEXEC);
		} while (size == -1 && errno == EINTR);
	}
	(void)close(fd);
	if (passed != NULL && size > 0) {
		header = CMSG_FIRSTHDR(&message);
		if (header == NULL || header->cmsg_type != SCM_RIGHTS) {
			size = 0;
		} else {
			memcpy(passed, CMSG_DATA(header), sizeof(int));
		}
	}
	if (size <= 0) {
		errno = ENETDOWN;
		return -1;
	}
	return size;
}

/* The mapping; NULL (errno ENETDOWN) when the session is gone. Needs no lock: who comes second drops what he made. */
static struct table *get_table(void)
{
	struct table *mine = __atomic_load_n(&table, __ATOMIC_ACQUIRE), *theirs = NULL;
	char answer;
	int fd = -1;

	if (mine != NULL) {
		return mine;
	}
	if (ask("T", 1, &answer, 1, &fd) != 1) {
		return NULL;
	}
	mine = mmap(NULL, sizeof(*mine), PROT_READ, MAP_SHARED, fd, 0);
	(void)close(fd);
	if (mine == MAP_FAILED || mine->header.magic != MAGIC) {
		errno = ENETDOWN;
		return NULL;
	}
	if (!__atomic_compare_exchange_n(&table, &theirs, mine, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
		(void)munmap(mine, sizeof(*mine));
		return theirs;
	}
	return mine;
}

/* --- addresses --- */

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

/* --- connections --- */

static int announce(int fd, int six, const struct destination *to)
{
	struct connect_request request = {.kind = 'C', .six = (unsigned char)six, .port = to->port};
	struct sockaddr_storage local;
	struct destination own;
	struct stat status;
	socklen_t size = sizeof(local);
	int32_t answer = 0;

	if (fstat(fd, &status) == -1 || getsockname(fd, (struct sockaddr *)&local, &size) == -1 ||
	    !parse_address((struct sockaddr *)&local, size, &own)) {
		return -1;
	}
	request.inode = (uint64_t)status.st_ino;
	request.local_port = own.port;
	memcpy(request.local, own.address, 16);
	memcpy(request.address, to->address, 16);
	if (ask(&request, sizeof(request), &answer, sizeof(answer), NULL) != sizeof(answer)) {
		return -1;
	}
	errno = answer;
	return answer == 0 ? 0 : -1;
}

/* Connect to the gate without waiting and say what for; -1 with EINPROGRESS when that was done. */
static int begin(int fd, const struct sockaddr *gate, socklen_t length, int six, const struct destination *to)
{
	static const struct sockaddr nowhere = {.sa_family = AF_UNSPEC};
	int flags = fcntl(fd, F_GETFL), off = 0, result, problem;

	if (flags == -1) {
		return -1;
	}
#ifdef TCP_FASTOPEN_CONNECT
	(void)setsockopt(fd, IPPROTO_TCP, TCP_FASTOPEN_CONNECT, &off, sizeof(off)); /* it would send nothing now */
#endif
	if (!(flags & O_NONBLOCK)) {
		(void)fcntl(fd, F_SETFL, flags | O_NONBLOCK);
	}
	result = REAL(connect)(fd, gate, length);
	problem = errno;
	if (result == -1 && problem == EINPROGRESS && announce(fd, six, to) == -1) {
		problem = errno;
		(void)REAL(connect)(fd, &nowhere, sizeof(nowhere));
	}
	if (!(flags & O_NONBLOCK)) {
		(void)fcntl(fd, F_SETFL, flags);
	}
	errno = problem;
	return result;
}

static int tunnel_connect(int fd, int family, const struct destination *to)
{
	static const struct sockaddr nowhere = {.sa_family = AF_UNSPEC};
	struct destination gate = {.port = 0};
	struct sockaddr_storage address;
	const struct header *header = &get_table()->header;
	socklen_t length;
	int six = family == AF_INET6 && header->gate6 != 0, result, refusal, blocking, flags;

	if (six) {
		gate.address[15] = 1;
	} else {
		memcpy(gate.address, mapped, sizeof(mapped));
		memcpy(gate.address + 12, "\x7f\0\0\1", 4);
	}
	gate.port = six ? header->gate6 : header->gate4;
	length = write_address(&gate, family, &address);
	result = begin(fd, (struct sockaddr *)&address, length, six, to);
	flags = fcntl(fd, F_GETFL);
	blocking = flags != -1 && !(flags & O_NONBLOCK);
	if (result == -1 && blocking && (errno == EINPROGRESS || errno == EALREADY)) {
		/* As a blocking connect does: wait, within SO_SNDTIMEO, until it is through; a signal interrupts it. */
		result = REAL(connect)(fd, (struct sockaddr *)&address, length);
		if (result == -1 && errno == EALREADY) {
			errno = EINPROGRESS;
		}
	}
	if (result == 0 || errno == ECONNRESET || errno == ECONNABORTED || errno == ECONNREFUSED) {
		/* Through, but not by us: the session has ended and a stranger listens at the gate's port. */
		refusal = result == 0 && entry_of(fd) == NULL ? ENETDOWN : refusal_of(fd);
		if (refusal != 0) {
			(void)REAL(connect)(fd, &nowhere, sizeof(nowhere)); /* it can be used again, as after a refusal */
			errno = refusal;
			return -1;
		}
	}
	return result;
}

EXPORTED int connect(int fd, const struct sockaddr *address, socklen_t length)
{
	struct destination to;

	switch (way_of(fd, address, length, &to)) {
	case TUNNEL:
		return tunnel_connect(fd, address->sa_family, &to);
	case REFUSE:
		return -1;
	case PASS:
	default:
		return REAL(connect)(fd, address, length);
	}
}

EXPORTED int getpeername(int fd, struct sockaddr *__restrict address, socklen_t *__restrict length)
{
	struct sockaddr_storage peer;
	struct destination found;
	const struct entry *entry;
	socklen_t size = sizeof(peer);

	if (session[0] == '\0' || length == NULL || REAL(getpeername)(fd, (struct sockaddr *)&peer, &size) == -1 ||
	    !parse_address((struct sockaddr *)&peer, size, &found) || !is_loopback(&found) || (entry = entry_of(fd)) == NULL) {
		return REAL(getpeername)(fd, address, length);
	}
	memcpy(found.address, entry->address, 16);
	found.port = entry->port;
	size = write_address(&found, peer.ss_family, &peer);
	memcpy(address, &peer, *length < size ? *length : size);
	*length = size;
	return 0;
}

EXPORTED int getsockopt(int fd, int level, int name, void *__restrict value, socklen_t *__restrict length)
{
	int result = REAL(getsockopt)(fd, level, name, value, length), refusal;

	if (session[0] == '\0' || result != 0 || level != SOL_SOCKET || name != SO_ERROR || *length != sizeof(int) ||
	    option(fd, SOL_SOCKET, SO_TYPE) != SOCK_STREAM) {
		return result;
	}
	if (*(int *)value == 0 || *(int *)value == ECONNRESET || *(int *)value == ECONNABORTED) {
		refusal = refusal_of(fd); /* the forwarder can only reset; the reason is in the table */
		if (refusal != 0) {
			*(int *)value = refusal;
		}
	}
	return 0;
}

/* --- what sends to an address: only what is connected can go through the session --- */

/* 1: go on; 0: connected (TCP Fast Open), send without the address; -1 with errno. */
static int before_sending(int fd, const struct sockaddr *address, socklen_t length, int flags)
{
	struct destination to;

	switch (address == NULL ? PASS : way_of(fd, address, length, &to)) {
	case TUNNEL:
		if (!(flags & MSG_FASTOPEN)) {
			return 1; /* the kernel ignores the address, or says that there is no connection */
		}
		return tunnel_connect(fd, address->sa_family, &to);
	case REFUSE:
		return -1;
	case PASS:
	default:
		return 1;
	}
}

EXPORTED ssize_t sendto(int fd, const void *data, size_t size, int flags, const struct sockaddr *address, socklen_t length)
{
	switch (before_sending(fd, address, length, flags)) {
	case -1:
		return -1;
	case 0:
		return REAL(sendto)(fd, data, size, flags & ~MSG_FASTOPEN, NULL, 0);
	default:
		return REAL(sendto)(fd, data, size, flags, address, length);
	}
}

EXPORTED ssize_t sendmsg(int fd, const struct msghdr *message, int flags)
{
	struct msghdr copy;

	if (session[0] == '\0' || message == NULL) {
		return REAL(sendmsg)(fd, message, flags);
	}
	switch (before_sending(fd, message->msg_name, message->msg_namelen, flags)) {
	case -1:
		return -1;
	case 0:
		copy = *message;
		copy.msg_name = NULL;
		copy.msg_namelen = 0;
		return REAL(sendmsg)(fd, &copy, flags & ~MSG_FASTOPEN);
	default:
		return REAL(sendmsg)(fd, message, flags);
	}
}

EXPORTED int sendmmsg(int fd, struct mmsghdr *messages, unsigned int count, int flags)
{
	struct destination to;
	unsigned int i;

	for (i = 0; session[0] != '\0' && i < count; i++) {
		if (messages[i].msg_hdr.msg_name != NULL &&
		    way_of(fd, messages[i].msg_hdr.msg_name, messages[i].msg_hdr.msg_namelen, &to) == REFUSE) {
			if (i == 0) {
				return -1;
			}
			break;
		}
	}
	return REAL(sendmmsg)(fd, messages, session[0] != '\0' ? i : count, flags);
}

#include "socks_exec.h"
#include "socks_names.h"

__attribute__((constructor)) static void load(void)
{
	const char *name = getenv(VARIABLE);
	Dl_info where;

	if (name == NULL || name[0] == '\0' || strlen(name) >= sizeof(session)) {
		return;
	}
	if (dladdr((void *)&load, &where) == 0 || strlen(where.dli_fname) >= sizeof(self)) {
		fprintf(stderr, "vpn: the path of the library of mode socks is not known\n");
		abort();
	}
	strcpy(self, where.dli_fname);
	strcpy(session, name);
	resolve_all();
	prepare_environment();
}
