/* A program that opens /dev/net/tun gets a tun device made elsewhere.
 *
 * Why: openconnect must stand in the host's network, where the VPN server is, while its tun device must belong to
 * the namespace the tasks run in. The device is made inside and its descriptor handed over in VPN_TUN_FD; this
 * answers open("/dev/net/tun") with a duplicate of it, and the TUNSETIFF that follows with the device's own name.
 * Every other call passes through. The variables are removed at once, so that no child inherits the shim.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

static int (*real_open)(const char *, int, ...);
static int (*real_open64)(const char *, int, ...);
static int (*real_ioctl)(int, unsigned long, ...);
static int injected = -1;
static int duplicate = -1;

static void *resolve(const char *name)
{
	void *symbol = dlsym(RTLD_NEXT, name);

	if (symbol == NULL) {
		fprintf(stderr, "tun_from_fd: the C library has no %s\n", name);
		abort();
	}
	return symbol;
}

__attribute__((constructor)) static void load(void)
{
	const char *number = getenv("VPN_TUN_FD");
	char *end = NULL;

	/* POSIX guarantees that a data pointer from dlsym holds a function; ISO C has no cast for it. */
	*(void **)&real_open = resolve("open");
	*(void **)&real_open64 = resolve("open64");
	*(void **)&real_ioctl = resolve("ioctl");
	if (number == NULL) {
		return;
	}
	injected = (int)strtol(number, &end, 10);
	if (end == number || *end != '\0' || fcntl(injected, F_GETFD) == -1) {
		fprintf(stderr, "tun_from_fd: VPN_TUN_FD=%s is not an open descriptor\n", number);
		abort();
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

int open(const char *path, int flags, ...)
{
	va_list arguments;
	mode_t mode = 0;

	if (injected != -1 && strcmp(path, "/dev/net/tun") == 0) {
		return open_tun(flags);
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
