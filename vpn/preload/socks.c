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

#include "socks_session.h"
#include "socks_address.h"

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
