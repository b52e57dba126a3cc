/* A program that opens /dev/net/tun gets a tun device made elsewhere.
 *
 * Why: openconnect must stand in the host's network, where the VPN server is, while its tun device must belong to
 * the namespace the tasks run in. The device is made inside and its descriptor handed over in VPN_TUN_FD; this
 * answers open("/dev/net/tun") with a duplicate of it, and the TUNSETIFF that follows with the device's own name.
 * Every other call passes through. The variables are removed at once, so that no child inherits the shim.
 *
 * A device made with IFF_VNET_HDR is read and written with a header before each packet, of which the program does not
 * know: it is taken off and put on here. Packets are written several at once (tun_gro.h), at the latest before the
 * program reads from the device or waits; and read several at once (tun_gso.h): while some are left, the device counts
 * as readable. The bytes of its connection to the server are sent and received likewise (stream.h). All of it only once
 * the program was seen to wait for the device. It is openconnect, which has one thread and uses both by one descriptor
 * and by no other calls than those below.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <unistd.h>

#include "stream.h"
#include "tun_gro.h"
#include "tun_gso.h"

enum { RETRY = 10 }; /* ms, where the device had no room */

#ifdef __GLIBC__
typedef unsigned long request_type;
static int (*real_open64)(const char *, int, ...);
#else
typedef int request_type; /* as POSIX has it */
#endif
static int (*real_open)(const char *, int, ...);
static int (*real_ioctl)(int, request_type, ...);
static ssize_t (*real_read)(int, void *, size_t);
static ssize_t (*real_write)(int, const void *, size_t);
static ssize_t (*real_writev)(int, const struct iovec *, int);
static int (*real_close)(int);
static int (*real_select)(int, fd_set *, fd_set *, fd_set *, struct timeval *);
static int (*real_poll)(struct pollfd *, nfds_t, int);
static int (*real_epoll_wait)(int, struct epoll_event *, int, int);
static int (*real_epoll_ctl)(int, int, int, struct epoll_event *);
static int injected = -1;
static int duplicate = -1;
static int headers; /* whether the device has them */
static int waits; /* whether the program is seen to wait for it: one that waits otherwise would leave packets behind */
static int refused; /* the kernel did not take what was joined */
static struct batch held;
static size_t unwritten; /* bytes of `held.data` that the device had no room for yet */
static struct super got;
static struct watch { /* how the program watches a descriptor by epoll, and that is ``epoll - 1`` */
	int epoll;
	struct epoll_event event;
} watches[DESCRIPTORS];
static int armed; /* whether we watch the connection for room, and the program does not */

static void *resolve(const char *name)
{
	void *symbol = dlsym(RTLD_NEXT, name);

	if (symbol == NULL) {
		fprintf(stderr, "tun_from_fd: the C library has no %s\n", name);
		abort();
	}
	return symbol;
}

static int has_headers(int fd)
{
	struct ifreq request = {0};

	return real_ioctl(fd, TUNGETIFF, &request) == 0 && (request.ifr_flags & IFF_VNET_HDR) != 0;
}

/* Also before our constructor: those of other libraries, which may run earlier, use these functions too. */
__attribute__((constructor)) static void load(void)
{
	const char *number = getenv("VPN_TUN_FD");
	char *end = NULL;

	if (real_epoll_ctl != NULL) {
		return;
	}
	/* POSIX guarantees that a data pointer from dlsym holds a function; ISO C has no cast for it. */
	*(void **)&real_open = resolve("open");
#ifdef __GLIBC__
	*(void **)&real_open64 = resolve("open64");
#endif
	*(void **)&real_ioctl = resolve("ioctl");
	*(void **)&real_read = resolve("read");
	*(void **)&real_write = resolve("write");
	*(void **)&real_writev = resolve("writev");
	*(void **)&real_close = resolve("close");
	*(void **)&real_select = resolve("select");
	*(void **)&real_poll = resolve("poll");
	*(void **)&real_epoll_wait = resolve("epoll_wait");
	*(void **)&real_recv = resolve("recv");
	*(void **)&real_send = resolve("send");
	*(void **)&real_sendmsg = resolve("sendmsg");
	*(void **)&real_epoll_ctl = resolve("epoll_ctl");
	if (number == NULL) {
		return;
	}
	injected = (int)strtol(number, &end, 10);
	if (end == number || *end != '\0' || fcntl(injected, F_GETFD) == -1) {
		fprintf(stderr, "tun_from_fd: VPN_TUN_FD=%s is not an open descriptor\n", number);
		abort();
	}
	headers = has_headers(injected);
	unsetenv("VPN_TUN_FD");
	unsetenv("LD_PRELOAD");
}

static int open_tun(int flags)
{
	duplicate = fcntl(injected, (flags & O_CLOEXEC) ? F_DUPFD_CLOEXEC : F_DUPFD, 3);
	return duplicate;
}

static int takes_mode(int flags)
{
	return (flags & O_CREAT) != 0 || (flags & O_TMPFILE) == O_TMPFILE;
}

/* Not /dev/vhost-net: by it a program would have the kernel read and write the device, past us. */
static int is_refused(const char *path)
{
	return headers && strcmp(path, "/dev/vhost-net") == 0;
}

static int open_by(int (*real)(const char *, int, ...), const char *path, int flags, mode_t mode)
{
	if (injected != -1 && strcmp(path, "/dev/net/tun") == 0) {
		return open_tun(flags);
	}
	if (is_refused(path)) {
		errno = ENOENT;
		return -1;
	}
	return real(path, flags, mode);
}

int open(const char *path, int flags, ...)
{
	va_list arguments;
	mode_t mode = 0;

	load();
	if (takes_mode(flags)) {
		va_start(arguments, flags);
		mode = va_arg(arguments, mode_t);
		va_end(arguments);
	}
	return open_by(real_open, path, flags, mode);
}

#ifdef __GLIBC__ /* in others the same, by a macro */
int open64(const char *path, int flags, ...)
{
	va_list arguments;
	mode_t mode = 0;

	load();
	if (takes_mode(flags)) {
		va_start(arguments, flags);
		mode = va_arg(arguments, mode_t);
		va_end(arguments);
	}
	return open_by(real_open64, path, flags, mode);
}
#endif

int ioctl(int fd, request_type request, ...)
{
	va_list arguments;
	void *argument;

	load();
	va_start(arguments, request);
	argument = va_arg(arguments, void *);
	va_end(arguments);
	if (fd != -1 && fd == duplicate && request == TUNSETIFF) {
		return real_ioctl(fd, TUNGETIFF, argument); /* it is made already: only tell its name */
	}
	return real_ioctl(fd, request, argument);
}

static ssize_t write_alone(const void *packet, size_t length)
{
	struct virtio_net_hdr header = {0};
	struct iovec parts[] = {{&header, HEADER}, {(void *)packet, length}};
	ssize_t written = real_writev(duplicate, parts, 2);

	return written < HEADER ? written : written - HEADER;
}

/* What was joined, as it came. */
static void write_again(void)
{
	static struct super joined;
	static unsigned char packet[LARGEST];

	memcpy(joined.data, held.data, unwritten);
	accept_packet(&joined, unwritten);
	refused = joined.head != 0;
	while (refused && joined.at < joined.length) {
		(void)!write_alone(packet, give(&joined, packet, sizeof(packet)));
	}
}

/* Give the device what is held; 0 when it has no room: then it is still held. What it refuses is lost, as it would be
 * to whoever wrote it.
 */
static int flush(void)
{
	int before = errno, done = 1;

	if (held.length != 0) {
		unwritten = take(&held);
	}
	if (unwritten != 0 && real_write(duplicate, held.data, unwritten) == -1) {
		done = errno != EAGAIN && errno != ENOBUFS && errno != EINTR;
		if (errno == EINVAL) {
			write_again();
		}
	}
	if (done) {
		unwritten = 0;
	}
	errno = before;
	return done;
}

static int hold(const void *packet, size_t length)
{
	return waits && !refused && unwritten == 0 && add(&held, packet, length);
}

ssize_t sendmsg(int fd, const struct msghdr *message, int flags)
{
	load();
	return waits && is_stream(fd) ? stream_send(message, flags) : real_sendmsg(fd, message, flags);
}

ssize_t send(int fd, const void *data, size_t length, int flags)
{
	struct iovec part = {(void *)data, length};
	struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};

	load();
	return waits && is_stream(fd) ? stream_send(&message, flags) : real_send(fd, data, length, flags);
}

ssize_t recv(int fd, void *data, size_t length, int flags)
{
	load();
	return waits && is_stream(fd) ? stream_receive(data, length, flags) : real_recv(fd, data, length, flags);
}

ssize_t write(int fd, const void *data, size_t length)
{
	load();
	if (!headers || fd == -1 || fd != duplicate) {
		return waits && is_stream(fd) ? send(fd, data, length, 0) : real_write(fd, data, length);
	}
	if (!hold(data, length)) {
		if (!flush()) {
			errno = EAGAIN;
			return -1;
		}
		if (!hold(data, length)) {
			return write_alone(data, length);
		}
	}
	if (held.closed) {
		flush();
	}
	return (ssize_t)length;
}

ssize_t read(int fd, void *data, size_t length)
{
	ssize_t count = 0;

	load();
	if (!headers || fd == -1 || fd != duplicate) {
		return waits && is_stream(fd) ? stream_receive(data, length, 0) : real_read(fd, data, length);
	}
	flush();
	do {
		if (got.at == got.length) {
			count = real_read(fd, got.data, sizeof(got.data));
			if (count <= 0) {
				return count;
			}
			accept_packet(&got, (size_t)count);
		}
		count = got.at < got.length ? (ssize_t)give(&got, data, length) : 0;
	} while (count == 0 && length != 0);
	return count;
}

/* Its number may be another file's next. */
int close(int fd)
{
	load();
	if (fd != -1 && fd == duplicate) {
		flush();
		unwritten = 0;
		got.at = got.length;
		duplicate = -1;
	}
	stream_close(fd);
	if (fd >= 0 && fd < DESCRIPTORS) {
		watches[fd].epoll = 0;
	}
	return real_close(fd);
}

#include "tun_waits.h"
