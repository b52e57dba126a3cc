/* What a server says as it ends arrives.
 *
 * Why: a TCP connection that is closed with bytes unread is reset (RFC 1122, 4.2.2.13), and a reset discards what the
 * other side has not read yet. An ocserv worker tells its client to disconnect and exits at once: a client that was
 * sending just then never learns that the gateway has ended in order, and dials until its reconnect timeout. So before
 * the process ends, each of its TCP connections is shut down for writing and read until the other side has closed it
 * too, all of them together for at most PATIENCE milliseconds.
 */
#define _GNU_SOURCE
#include <poll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define PATIENCE 2000
#define MANY 64 /* a worker has one */
#define FILES 1024

static int is_tcp_connection(int fd)
{
	int type = 0, domain = 0;
	socklen_t size = sizeof type;
	struct sockaddr_storage peer;
	socklen_t length = sizeof peer;

	if (getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) || type != SOCK_STREAM)
		return 0;
	size = sizeof domain;
	if (getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &size) || (domain != AF_INET && domain != AF_INET6))
		return 0;
	return getpeername(fd, (struct sockaddr *)&peer, &length) == 0;
}

static int milliseconds_since(const struct timespec *began)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int)((now.tv_sec - began->tv_sec) * 1000 + (now.tv_nsec - began->tv_nsec) / 1000000);
}

static pid_t self;

__attribute__((constructor)) static void remember(void)
{
	self = getpid();
}

__attribute__((destructor)) static void let_them_read(void)
{
	struct pollfd open[MANY];
	struct timespec began;
	struct rlimit limit;
	char unread[16384];
	int count = 0, left, spent, end = FILES;

	if (getpid() != self)
		return; /* a fork: the connections are its parent's */
	self = 0;
	if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < FILES)
		end = (int)limit.rlim_cur;
	for (int fd = 0; fd < end && count < MANY; fd++)
		if (is_tcp_connection(fd) && shutdown(fd, SHUT_WR) == 0)
			open[count++] = (struct pollfd){.fd = fd, .events = POLLIN};
	clock_gettime(CLOCK_MONOTONIC, &began);
	for (left = count; left > 0 && (spent = milliseconds_since(&began)) < PATIENCE;) {
		if (poll(open, (nfds_t)count, PATIENCE - spent) <= 0)
			break;
		for (int one = 0; one < count; one++)
			if (open[one].fd >= 0 && open[one].revents &&
			    recv(open[one].fd, unread, sizeof unread, MSG_DONTWAIT) <= 0) {
				open[one].fd = -1;
				left--;
			}
	}
}

/* ocserv-worker ends with this one, which runs no destructors. */
void _exit(int status)
{
	let_them_read();
	syscall(SYS_exit_group, status);
	__builtin_unreachable();
}
