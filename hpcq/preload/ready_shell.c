/* A shell that has been started once begins for each command anew.
 *
 * Why: most of what a short command costs is the start of /bin/sh: its libraries are mapped and relocated page by page,
 * which takes several times longer than a fork of a shell in which that is done. So this library, preloaded into one,
 * stops it before its main(). For each request it makes a child, a copy of the shell as it is, that goes on into main()
 * with the command as argv[2], as if it had just been started with `sh -c COMMAND`. (AFL's fork server is made so.)
 *
 * The child is not ours but our parent's (CLONE_PARENT), which started us, asks, and waits for it: so $PPID, waiting,
 * and the child's resource usage are what they would be without us.
 *
 * HPCQ_READY_SHELL is the descriptor of a SOCK_SEQPACKET socket. We say 0 when we are ready. A request is the working
 * directory, the command and NAME=VALUE for each change of the environment, each with its NUL; the answer is an int32: the
 * child's number, or an errno (negative). This library's place in LD_PRELOAD and the variable are gone before
 * the first child, which therefore has the environment of our parent. The end of the socket is ours.
 *
 * Where the C library or the kernel is not as needed we say nothing, and the shell does what it was started for: the
 * starter has it do nothing.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <gnu/libc-version.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { REQUEST_LIMIT = 128 * 1024 };

static char request[REQUEST_LIMIT + 1];

/* A fork whose child is our parent's. The C library keeps the thread's number, which must be the child's there. */
static pid_t make_sibling(int *thread)
{
	unsigned long flags = CLONE_PARENT | CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID | SIGCHLD;

#if defined(__x86_64__)
	return (pid_t)syscall(SYS_clone, flags, 0UL, NULL, thread, 0UL);
#elif defined(__aarch64__) || defined(__powerpc64__)
	return (pid_t)syscall(SYS_clone, flags, 0UL, NULL, 0UL, thread);
#else
	(void)flags;
	(void)thread;
	errno = ENOSYS;
	return -1;
#endif
}

/* Older C libraries keep a process's number, which a child that they did not make would have wrong. */
static int is_suitable(void)
{
	char *end = NULL;
	long major = strtol(gnu_get_libc_version(), &end, 10);
	long minor = *end == '.' ? strtol(end + 1, NULL, 10) : 0;

	return major > 2 || (major == 2 && minor >= 25);
}

/* Take this library's path out of LD_PRELOAD, wherever others have put theirs. */
static int leave_preload(void)
{
	char *list = getenv("LD_PRELOAD");
	size_t length;
	char *found;
	Dl_info us;

	if (list == NULL || dladdr((void *)&leave_preload, &us) == 0) {
		return 0;
	}
	found = strstr(list, us.dli_fname);
	if (found == NULL) {
		return 0;
	}
	length = strlen(us.dli_fname);
	if (found[length] != '\0') {
		length++; /* the separator */
	}
	memmove(found, found + length, strlen(found + length) + 1);
	length = strlen(list);
	if (length > 0 && (list[length - 1] == ':' || list[length - 1] == ' ')) {
		list[length - 1] = '\0';
	}
	if (list[0] == '\0') {
		unsetenv("LD_PRELOAD");
	}
	return 1;
}

/* In the child: what listings of processes show is in the place of the old command; the rest of it are blanks. */
static void take_command(char **argv, char *command)
{
	size_t room = strlen(argv[2]);
	size_t length = strlen(command);

	memcpy(argv[2], command, length < room ? length : room);
	argv[2] = command;
}

static void take_environment(char *changes, const char *end)
{
	while (changes < end) {
		char *next = changes + strlen(changes) + 1;
		char *value = strchr(changes, '=');

		if (value != NULL) {
			*value = '\0';
			setenv(changes, value + 1, 1);
		}
		changes = next;
	}
}

static void answer(int channel, int32_t word)
{
	if (send(channel, &word, sizeof word, MSG_NOSIGNAL) != (ssize_t)sizeof word) {
		_exit(0);
	}
}

__attribute__((constructor)) static void serve(int argc, char **argv)
{
	const char *setting = getenv("HPCQ_READY_SHELL");
	int *thread = NULL;
	int channel;

	if (setting == NULL || argc != 3 || !is_suitable()) {
		return;
	}
	if (prctl(PR_GET_TID_ADDRESS, &thread, 0, 0, 0) != 0 || thread == NULL || *thread != getpid()) {
		return;
	}
	channel = atoi(setting);
	if (!leave_preload()) {
		return;
	}
	unsetenv("HPCQ_READY_SHELL");
	answer(channel, 0);
	for (;;) {
		ssize_t size = recv(channel, request, REQUEST_LIMIT, 0);
		char *command, *changes;
		pid_t child;

		if (size < 0 && errno == EINTR) {
			continue;
		}
		if (size <= 0) {
			_exit(0);
		}
		request[size] = '\0';
		command = request + strlen(request) + 1;
		if (chdir(request) != 0) {
			answer(channel, -errno);
			continue;
		}
		child = make_sibling(thread);
		if (child == 0) {
			close(channel);
			changes = command + strlen(command) + 1;
			take_environment(changes, request + size);
			take_command(argv, command);
			return;
		}
		answer(channel, child > 0 ? child : -errno);
	}
}
