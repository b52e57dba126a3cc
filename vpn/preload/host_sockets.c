/* A server in a namespace of its own listens on the host's network.
 *
 * Why: what is encrypted should go from the host's kernel to the server with nothing in between: no program that
 * copies every packet, and none that takes the last bytes of a connection with it when it is killed. A socket belongs
 * to the namespace it was made in, whoever holds it. So bind() of an Internet socket to the server's port asks whoever
 * started the server for a socket of the host's, of the same kind and bound to the same address, and puts it in the
 * place of the one given. All other calls pass through, bind() to another port too.
 *
 * VPN_HOST_SOCKETS is FD:PORT; FD is a SOCK_SEQPACKET socket. A request is a struct request; the answer is an errno
 * (0: granted) as an int, with the socket beside it (SCM_RIGHTS). The variable is removed and FD made close-on-exec:
 * children that bind are none of ours.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

struct request {
	int32_t type;   /* SOCK_STREAM or SOCK_DGRAM */
	int32_t family; /* AF_INET or AF_INET6 */
	uint8_t address[16];
};

static int (*real_bind)(int, const struct sockaddr *, socklen_t);
static int keeper = -1;
static in_port_t our_port;

__attribute__((constructor)) static void load(void)
{
	const char *setting = getenv("VPN_HOST_SOCKETS");
	char *end = NULL;
	long port;

	/* POSIX guarantees that a data pointer from dlsym holds a function; ISO C has no cast for it. */
	*(void **)&real_bind = dlsym(RTLD_NEXT, "bind");
	if (real_bind == NULL) {
		fprintf(stderr, "host_sockets: the C library has no bind\n");
		abort();
	}
	if (setting == NULL) {
		return;
	}
	keeper = (int)strtol(setting, &end, 10);
	port = *end == ':' ? strtol(end + 1, &end, 10) : 0;
	if (*end != '\0' || port < 1 || port > 65535 || fcntl(keeper, F_SETFD, FD_CLOEXEC) == -1) {
		fprintf(stderr, "host_sockets: VPN_HOST_SOCKETS=%s is not an open descriptor and a port\n", setting);
		abort();
	}
	our_port = htons((uint16_t)port);
	unsetenv("VPN_HOST_SOCKETS");
}

/* Whether this address is ours to ask for; fills the request's family and address. */
static int is_ours(const struct sockaddr *address, socklen_t length, struct request *request)
{
	const struct sockaddr_in *four = (const void *)address;
	const struct sockaddr_in6 *six = (const void *)address;

	if (keeper == -1 || address == NULL || length < sizeof(sa_family_t)) {
		return 0;
	}
	request->family = address->sa_family;
	if (address->sa_family == AF_INET && length >= sizeof(*four)) {
		memcpy(request->address, &four->sin_addr, sizeof(four->sin_addr));
		return four->sin_port == our_port;
	}
	if (address->sa_family == AF_INET6 && length >= sizeof(*six)) {
		memcpy(request->address, &six->sin6_addr, sizeof(six->sin6_addr));
		return six->sin6_port == our_port;
	}
	return 0;
}

/* The host's socket, or -1 with errno. */
static int ask(const struct request *request)
{
	union {
		char space[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control;
	int code = 0;
	struct iovec data = {.iov_base = &code, .iov_len = sizeof(code)};
	struct msghdr message = {
	    .msg_iov = &data, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)};
	struct cmsghdr *part;
	ssize_t got;
	int fd;

	do {
		got = send(keeper, request, sizeof(*request), MSG_NOSIGNAL);
	} while (got == -1 && errno == EINTR);
	if (got == -1) {
		return -1;
	}
	do {
		got = recvmsg(keeper, &message, MSG_CMSG_CLOEXEC);
	} while (got == -1 && errno == EINTR);
	if (got == -1) {
		return -1;
	}
	part = CMSG_FIRSTHDR(&message);
	if (got != sizeof(code) || code != 0 || part == NULL || part->cmsg_type != SCM_RIGHTS) {
		errno = got == sizeof(code) && code != 0 ? code : ECONNABORTED;
		return -1;
	}
	memcpy(&fd, CMSG_DATA(part), sizeof(fd));
	return fd;
}

int bind(int fd, const struct sockaddr *address, socklen_t length)
{
	struct request request = {0};
	socklen_t size = sizeof(request.type);
	int mine, result, flags, problem;

	if (!is_ours(address, length, &request) || getsockopt(fd, SOL_SOCKET, SO_TYPE, &request.type, &size) == -1) {
		return real_bind(fd, address, length);
	}
	mine = ask(&request);
	if (mine == -1) {
		return -1;
	}
	flags = fcntl(fd, F_GETFD);
	result = dup3(mine, fd, flags != -1 && (flags & FD_CLOEXEC) ? O_CLOEXEC : 0);
	problem = errno;
	close(mine);
	errno = problem;
	return result == -1 ? -1 : 0;
}
