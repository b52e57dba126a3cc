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
 * as readable. Both only once the program was seen to wait for the device. It is openconnect, which has one thread and
 * uses it by one descriptor and by no other calls than those below.
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
#include <sys/time.h>
#include <sys/uio.h>
#include <unistd.h>

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
static struct { int fd; struct epoll_event event; } watch = {.fd = -1}; /* how the program watches the device */

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

ssize_t write(int fd, const void *data, size_t length)
{
	load();
	if (!headers || fd == -1 || fd != duplicate) {
		return real_write(fd, data, length);
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
		return real_read(fd, data, length);
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
		watch.fd = duplicate = -1;
	}
	return real_close(fd);
}

/* Before the program waits, for the device too (`watched`) or not: how long it may at most, in ms; -1: as it likes. */
static int about_to_wait(int watched)
{
	if (!headers || duplicate == -1) {
		return -1;
	}
	if (watched && !waits) {
		waits = 1;
		if (real_ioctl(duplicate, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6) != 0) {
			perror("tun_from_fd: TUNSETOFFLOAD"); /* then the kernel does all of it, and packets come one by one */
		}
	}
	if (watched && got.at < got.length) {
		flush();
		return 0;
	}
	return flush() ? -1 : RETRY;
}

int select(int count, fd_set *readable, fd_set *writable, fd_set *special, struct timeval *limit)
{
	int watched, most, ready;
	struct timeval soon = {0};

	load();
	watched = duplicate != -1 && duplicate < count && readable != NULL && FD_ISSET(duplicate, readable);
	most = about_to_wait(watched);
	soon.tv_usec = most * 1000;
	if (most != -1 && (limit == NULL || timercmp(limit, &soon, >))) {
		limit = &soon;
	}
	ready = real_select(count, readable, writable, special, limit);
	if (most == 0 && ready != -1 && !FD_ISSET(duplicate, readable)) {
		FD_SET(duplicate, readable);
		ready++;
	}
	return ready;
}

int poll(struct pollfd *descriptors, nfds_t count, int limit)
{
	nfds_t index = 0;
	int most, ready;

	load();
	while (index < count && (duplicate == -1 || descriptors[index].fd != duplicate ||
				 !(descriptors[index].events & (POLLIN | POLLRDNORM)))) {
		index++;
	}
	most = about_to_wait(index < count);
	ready = real_poll(descriptors, count, most != -1 && (limit < 0 || limit > most) ? most : limit);
	if (most == 0 && ready != -1) {
		ready += descriptors[index].revents == 0;
		descriptors[index].revents |= descriptors[index].events & (POLLIN | POLLRDNORM);
	}
	return ready;
}

int epoll_ctl(int fd, int operation, int watched, struct epoll_event *event)
{
	int done;

	load();
	done = real_epoll_ctl(fd, operation, watched, event);
	if (done == 0 && watched != -1 && watched == duplicate) {
		watch.fd = operation == EPOLL_CTL_DEL ? -1 : fd;
		if (operation != EPOLL_CTL_DEL) {
			watch.event = *event;
		}
	}
	return done;
}

int epoll_wait(int fd, struct epoll_event *events, int count, int limit)
{
	int most, ready, index;

	load();
	most = about_to_wait(fd != -1 && fd == watch.fd && (watch.event.events & EPOLLIN));
	ready = real_epoll_wait(fd, events, count, most != -1 && (limit < 0 || limit > most) ? most : limit);
	if (most != 0 || ready == -1) {
		return ready;
	}
	for (index = 0; index < ready && events[index].data.u64 != watch.event.data.u64; index++) {
	}
	if (index == count) {
		return ready; /* no room: next time */
	}
	if (index == ready) {
		events[ready++] = (struct epoll_event){.events = 0, .data = watch.event.data};
	}
	events[index].events |= EPOLLIN;
	return ready;
}
