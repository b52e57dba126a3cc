/* Part of socks.c: what a program may become by exec, and the environment it gets.
 *
 * A program this library cannot be loaded into, or which does not use the C library's calls, would go round the session: it is
 * refused, with a line on standard error and EACCES. The library and its session are put back into an environment from which
 * they were removed. Everything between vfork and exec uses the stack and system calls only.
 */
#include <alloca.h>
#include <spawn.h>
#include <stdarg.h>

#include "socks_programs.h"

/* --- the environment --- */

static char preload_entry[sizeof("LD_PRELOAD=") + sizeof(self)];
static char session_entry[sizeof(VARIABLE "=") + sizeof(session)];

static void prepare_environment(void)
{
	(void)stpcpy(stpcpy(preload_entry, "LD_PRELOAD="), self);
	(void)stpcpy(stpcpy(session_entry, VARIABLE "="), session);
}

static int is_variable(const char *entry, const char *name)
{
	size_t length = strlen(name);

	return strncmp(entry, name, length) == 0 && entry[length] == '=';
}

static size_t count_of(char *const *list)
{
	size_t count = 0;

	while (list != NULL && list[count] != NULL) {
		count++;
	}
	return count;
}

/* Room for what `keep` needs, on the stack of its caller. */
struct kept {
	char **list;
	char *preload;
};

#define ROOM_FOR(environment) \
	{ \
		alloca((count_of(environment) + 3) * sizeof(char *)), \
		alloca(preload_length(environment) + sizeof(preload_entry) + 1) \
	}

static size_t preload_length(char *const *environment)
{
	size_t i, length = 0;

	for (i = 0; environment != NULL && environment[i] != NULL; i++) {
		if (is_variable(environment[i], "LD_PRELOAD")) {
			length = strlen(environment[i]);
		}
	}
	return length;
}

/* The environment with this library first in LD_PRELOAD, and with a session: another one, where it names one. */
static char **keep(char *const *environment, struct kept room)
{
	size_t i, count = 0, length = strlen(preload_entry);
	char *named = session_entry;
	const char *others = NULL;

	for (i = 0; environment != NULL && environment[i] != NULL; i++) {
		if (is_variable(environment[i], "LD_PRELOAD")) {
			others = environment[i] + sizeof("LD_PRELOAD=") - 1;
		} else if (!is_variable(environment[i], VARIABLE)) {
			room.list[count++] = environment[i];
		} else if (environment[i][sizeof(VARIABLE)] != '\0') {
			named = environment[i];
		}
	}
	if (others != NULL && strstr(others, self) != NULL) {
		(void)stpcpy(stpcpy(room.preload, "LD_PRELOAD="), others);
	} else {
		memcpy(room.preload, preload_entry, length + 1);
		if (others != NULL && others[0] != '\0') {
			room.preload[length] = ':';
			(void)stpcpy(room.preload + length + 1, others);
		}
	}
	room.list[count++] = room.preload;
	room.list[count++] = named;
	room.list[count] = NULL;
	return room.list;
}

/* system() and popen() exec inside the C library, with environ. */
static void keep_environ(void)
{
	const char *others = getenv("LD_PRELOAD");

	if (session[0] != '\0') {
		if (others == NULL || strstr(others, self) == NULL) {
			struct kept room = ROOM_FOR(environ);

			(void)keep(environ, room);
			(void)setenv("LD_PRELOAD", room.preload + sizeof("LD_PRELOAD=") - 1, 1);
		}
		(void)setenv(VARIABLE, session, getenv(VARIABLE) == NULL || *getenv(VARIABLE) == '\0');
	}
}

/* --- exec and its relatives --- */

EXPORTED int execve(const char *path, char *const arguments[], char *const environment[])
{
	if (session[0] == '\0') {
		return REAL(execve)(path, arguments, environment);
	}
	if (refused(path)) {
		return -1;
	}
	struct kept room = ROOM_FOR(environment);

	return REAL(execve)(path, arguments, keep(environment, room));
}

EXPORTED int execv(const char *path, char *const arguments[])
{
	return execve(path, arguments, environ);
}

EXPORTED int execvpe(const char *file, char *const arguments[], char *const environment[])
{
	if (session[0] == '\0') {
		return REAL(execvpe)(file, arguments, environment);
	}
	if (refused_on_path(file)) {
		return -1;
	}
	struct kept room = ROOM_FOR(environment);

	return REAL(execvpe)(file, arguments, keep(environment, room));
}

EXPORTED int execvp(const char *file, char *const arguments[])
{
	return execvpe(file, arguments, environ);
}

EXPORTED int fexecve(int fd, char *const arguments[], char *const environment[])
{
	const char *reason;

	if (session[0] == '\0') {
		return REAL(fexecve)(fd, arguments, environment);
	}
	reason = refuse_file(fd, "", SCRIPT_DEPTH);
	if (reason != NULL) {
		return complain("a program given by its descriptor", reason);
	}
	struct kept room = ROOM_FOR(environment);

	return REAL(fexecve)(fd, arguments, keep(environment, room));
}

#if defined(__GLIBC__) && __GLIBC_PREREQ(2, 34)
#define HAVE_EXECVEAT
EXPORTED int execveat(int directory, const char *path, char *const arguments[], char *const environment[], int flags)
{
	const char *reason;

	if (session[0] == '\0') {
		return REAL(execveat)(directory, path, arguments, environment, flags);
	}
	reason = (flags & AT_EMPTY_PATH) && path[0] == '\0'
			 ? refuse_file(directory, "", SCRIPT_DEPTH)
			 : refuse_at(directory, path, flags & AT_SYMLINK_NOFOLLOW ? O_NOFOLLOW : 0);
	if (reason != NULL) {
		return complain(path[0] == '\0' ? "a program given by its descriptor" : path, reason);
	}
	struct kept room = ROOM_FOR(environment);

	return REAL(execveat)(directory, path, arguments, keep(environment, room), flags);
}
#endif

/* The arguments of execl and its relatives as an array; `last` then names what follows their NULL. */
#define GATHER(first, list, last) \
	va_list last, counting; \
	size_t count_ = 1; \
	va_start(counting, first); \
	while (va_arg(counting, char *) != NULL) { \
		count_++; \
	} \
	va_end(counting); \
	char **list = alloca((count_ + 1) * sizeof(char *)); \
	list[0] = (char *)(uintptr_t)first; \
	va_start(last, first); \
	for (size_t i_ = 1; i_ <= count_; i_++) { \
		list[i_] = va_arg(last, char *); \
	}

EXPORTED int execl(const char *path, const char *first, ...)
{
	GATHER(first, list, rest)
	va_end(rest);
	return execve(path, list, environ);
}

EXPORTED int execlp(const char *file, const char *first, ...)
{
	GATHER(first, list, rest)
	va_end(rest);
	return execvpe(file, list, environ);
}

EXPORTED int execle(const char *path, const char *first, ...)
{
	GATHER(first, list, rest)
	char *const *environment = va_arg(rest, char *const *);

	va_end(rest);
	return execve(path, list, environment);
}

EXPORTED int posix_spawn(pid_t *__restrict pid, const char *__restrict path, const posix_spawn_file_actions_t *__restrict actions,
			 const posix_spawnattr_t *__restrict attributes, char *const arguments[__restrict],
			 char *const environment[__restrict])
{
	if (session[0] == '\0') {
		return REAL(posix_spawn)(pid, path, actions, attributes, arguments, environment);
	}
	if (refused(path)) {
		return EACCES;
	}
	struct kept room = ROOM_FOR(environment);

	return REAL(posix_spawn)(pid, path, actions, attributes, arguments, keep(environment, room));
}

EXPORTED int posix_spawnp(pid_t *__restrict pid, const char *__restrict file, const posix_spawn_file_actions_t *__restrict actions,
			  const posix_spawnattr_t *__restrict attributes, char *const arguments[__restrict],
			  char *const environment[__restrict])
{
	if (session[0] == '\0') {
		return REAL(posix_spawnp)(pid, file, actions, attributes, arguments, environment);
	}
	if (refused_on_path(file)) {
		return EACCES;
	}
	struct kept room = ROOM_FOR(environment);

	return REAL(posix_spawnp)(pid, file, actions, attributes, arguments, keep(environment, room));
}

EXPORTED int system(const char *command)
{
	keep_environ();
	return REAL(system)(command);
}

EXPORTED FILE *popen(const char *command, const char *mode)
{
	keep_environ();
	return REAL(popen)(command, mode);
}
