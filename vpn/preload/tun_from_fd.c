/* A program that opens /dev/net/tun gets a tun device made elsewhere.
 *
 * Why: openconnect must stand in the host's network, where the VPN server is, while its tun device must belong to
 * the namespace the tasks run in. The device is made inside and its descriptor handed over in VPN_TUN_FD; this
 * answers open("/dev/net/tun") with a duplicate of it, and the TUNSETIFF that follows with the device's own name.
 * Every other call passes through. The variables are removed at once, so that no child inherits the shim.
 *
 * A device made with IFF_VNET_HDR is read and written with a header before each packet, of which the program does not
 * know: it is taken off and put on here. Packets are written several at once (tun_gro.h), at the latest before the program reads
 * from the device or waits; and read several at once (tun_gso.h): while some are left, the device counts as readable.
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
#include <sys/uio.h>
#include <unistd.h>

#include "tun_gro.h"
#include "tun_gso.h"

static int (*real_open)(const char *, int, ...);
static int (*real_open64)(const char *, int, ...);
static int (*real_ioctl)(int, unsigned long, ...);
static ssize_t (*real_read)(int, void *, size_t);
static ssize_t (*real_write)(int, const void *, size_t);
static int (*real_select)(int, fd_set *, fd_set *, fd_set *, struct timeval *);
static int (*real_poll)(struct pollfd *, nfds_t, int);
static int (*real_epoll_wait)(int, struct epoll_event *, int, int);
static int (*real_epoll_ctl)(int, int, int, struct epoll_event *);
static int injected = -1;
static int duplicate = -1;
static int headers; /* whether the device has them */
static int waits; /* whether the program is seen to wait: one that waits otherwise would leave packets behind */
static struct batch held;
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

__attribute__((constructor)) static void load(void)
{
	const char *number = getenv("VPN_TUN_FD");
	char *end = NULL;

	/* POSIX guarantees that a data pointer from dlsym holds a function; ISO C has no cast for it. */
	*(void **)&real_open = resolve("open");
	*(void **)&real_open64 = resolve("open64");
	*(void **)&real_ioctl = resolve("ioctl");
	*(void **)&real_read = resolve("read");
	*(void **)&real_write = resolve("write");
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
	if (headers && real_ioctl(injected, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6) != 0) {
		perror("tun_from_fd: TUNSETOFFLOAD"); /* then the kernel does all of it, and packets come one by one */
	}
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

int open(const char *path, int flags, ...)
{
	va_list arguments;
	mode_t mode = 0;

	if (injected != -1 && strcmp(path, "/dev/net/tun") == 0) {
		return open_tun(flags);
	}
	if (is_refused(path)) {
		errno = ENOENT;
		return -1;
	}
	if (takes_mode(flags)) {
		va_start(arguments, flags);
		mode = va_arg(arguments, mode_t);
		va_end(arguments);
	}
	return real_open(path, flags, mode);
}

int open64(const char *path, int flags, ...)
{
	va_list arguments;
	mode_t mode = 0;

	if (injected != -1 && strcmp(path, "/dev/net/tun") == 0) {
		return open_tun(flags);
	}
	if (is_refused(path)) {
		errno = ENOENT;
		return -1;
	}
	if (takes_mode(flags)) {
		va_start(arguments, flags);
		mode = va_arg(arguments, mode_t);
		va_end(arguments);
	}
	return real_open64(path, flags, mode);
}

int ioctl(int fd, unsigned long request, ...)
{
	va_list arguments;
	void *argument;

	va_start(arguments, request);
	argument = va_arg(arguments, void *);
	va_end(arguments);
	if (fd != -1 && fd == duplicate && request == TUNSETIFF) {
		return real_ioctl(fd, TUNGETIFF, argument); /* it is made already: only tell its name */
	}
	return real_ioctl(fd, request, argument);
}

/* What cannot be written is lost, as in a queue that is full: TCP sends it again. */
static void flush(void)
{
	int before = errno;

	if (held.length != 0) {
		size_t length = take(&held);

		(void)!real_write(duplicate, held.data, length);
	}
	errno = before;
}

static void about_to_wait(void)
{
	waits = 1;
	flush();
}

static ssize_t write_alone(const void *packet, size_t length)
{
	struct virtio_net_hdr header = {0};
	struct iovec parts[] = {{&header, HEADER}, {(void *)packet, length}};
	ssize_t written = writev(duplicate, parts, 2);

	return written < HEADER ? written : written - HEADER;
}

ssize_t write(int fd, const void *data, size_t length)
{
	if (!headers || fd == -1 || fd != duplicate) {
		return real_write(fd, data, length);
	}
	if (!waits) {
		return write_alone(data, length);
	}
	if (!add(&held, data, length)) {
		flush();
		if (!add(&held, data, length)) {
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
	ssize_t count;

	if (!headers || fd == -1 || fd != duplicate) {
		return real_read(fd, data, length);
	}
	flush();
	while (got.at == got.length) {
		count = real_read(fd, got.data, sizeof(got.data));
		if (count <= 0) {
			return count;
		}
		accept_packet(&got, (size_t)count);
	}
	return (ssize_t)give(&got, data, length);
}

/* Whether what was read already is all the program waits for. */
static int is_left(void)
{
	return headers && duplicate != -1 && got.at < got.length;
}

int select(int count, fd_set *readable, fd_set *writable, fd_set *special, struct timeval *limit)
{
	struct timeval none = {0};
	int ready;

	about_to_wait();
	if (!is_left() || readable == NULL || duplicate >= count || !FD_ISSET(duplicate, readable)) {
		return real_select(count, readable, writable, special, limit);
	}
	ready = real_select(count, readable, writable, special, &none);
	if (ready != -1 && !FD_ISSET(duplicate, readable)) {
		FD_SET(duplicate, readable);
		ready++;
	}
	return ready;
}

int poll(struct pollfd *descriptors, nfds_t count, int limit)
{
	nfds_t index = 0;
	int ready;

	about_to_wait();
	while (index < count && (descriptors[index].fd != duplicate || !(descriptors[index].events & POLLIN))) {
		index++;
	}
	if (!is_left() || index == count) {
		return real_poll(descriptors, count, limit);
	}
	ready = real_poll(descriptors, count, 0);
	if (ready == -1) {
		return -1;
	}
	ready += descriptors[index].revents == 0;
	descriptors[index].revents |= POLLIN;
	return ready;
}

int epoll_ctl(int fd, int operation, int watched, struct epoll_event *event)
{
	int done = real_epoll_ctl(fd, operation, watched, event);

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
	int ready, index;

	about_to_wait();
	if (!is_left() || fd != watch.fd || !(watch.event.events & EPOLLIN)) {
		return real_epoll_wait(fd, events, count, limit);
	}
	ready = real_epoll_wait(fd, events, count, 0);
	if (ready == -1) {
		return -1;
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
