/* Part of socks.c: which programs cannot be served, and the line that says so. Stack and system calls only: it runs between
 * vfork and exec.
 */
#include <elf.h>
#include <link.h>
#include <sys/prctl.h>
#include <sys/statvfs.h>
#include <sys/uio.h>
#include <sys/xattr.h>

#define SCRIPT_DEPTH 5
#define PATH_LIMIT 4096

/* --- what cannot be served --- */

static const char *const is_static = "it is statically linked";
static const char *const is_setuid = "it is setuid or setgid";
static const char *const is_capable = "it has file capabilities";
static const char *const is_foreign = "it is for another kind of machine";
static const char *const is_musl = "it is for another C library";
static const char *const is_go = "it is a Go program, which makes its own system calls";

static const char *refuse_privileged(int fd, const struct stat *status)
{
	struct statvfs mount;

	if (prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1 || (fstatvfs(fd, &mount) == 0 && (mount.f_flag & ST_NOSUID))) {
		return NULL; /* exec will ignore all of this */
	}
	if (((status->st_mode & S_ISUID) && status->st_uid != geteuid()) ||
	    ((status->st_mode & (S_ISGID | S_IXGRP)) == (S_ISGID | S_IXGRP) && status->st_gid != getegid())) {
		return is_setuid;
	}
	return geteuid() != 0 && fgetxattr(fd, "security.capability", NULL, 0) > 0 ? is_capable : NULL;
}

static int is_go_note(int fd, const ElfW(Phdr) * segment)
{
	struct {
		ElfW(Nhdr) header;
		char name[4];
	} note;

	return pread(fd, &note, sizeof(note), (off_t)segment->p_offset) == (ssize_t)sizeof(note) && note.header.n_namesz == 4 &&
	       memcmp(note.name, "Go\0", 4) == 0;
}

/* The dynamic loader run as a program loads this library as well; no other program without an interpreter does. */
static int is_loader(const char *path)
{
	const char *base = strrchr(path, '/');

	base = base == NULL ? path : base + 1;
	return strncmp(base, "ld", 2) == 0 && strstr(base, ".so") != NULL;
}

static const char *refuse_elf(int fd, const char *path)
{
	ElfW(Ehdr) header;
	ElfW(Phdr) segment;
	const ElfW(Ehdr) *ours = NULL;
	char interpreter[256] = "";
	Dl_info where;
	unsigned i;

	if (dladdr((void *)&refuse_elf, &where) != 0) {
		ours = where.dli_fbase;
	}
	if (pread(fd, &header, sizeof(header), 0) != (ssize_t)sizeof(header) || ours == NULL) {
		return is_foreign;
	}
	if (header.e_ident[EI_CLASS] != ours->e_ident[EI_CLASS] || header.e_machine != ours->e_machine) {
		return is_foreign;
	}
	for (i = 0; i < header.e_phnum; i++) {
		if (pread(fd, &segment, sizeof(segment), (off_t)(header.e_phoff + (ElfW(Off))i * header.e_phentsize)) !=
		    (ssize_t)sizeof(segment)) {
			break;
		}
		if (segment.p_type == PT_NOTE && is_go_note(fd, &segment)) {
			return is_go;
		}
		if (segment.p_type == PT_INTERP &&
		    pread(fd, interpreter, sizeof(interpreter) - 1, (off_t)segment.p_offset) <= 0) {
			interpreter[0] = '\0';
		}
	}
	if (interpreter[0] == '\0') {
		return is_loader(path) ? NULL : is_static;
	}
#ifdef __GLIBC__
	return strstr(interpreter, "ld-musl") != NULL ? is_musl : NULL;
#else
	return NULL;
#endif
}

/* The interpreter named by a script's first line, into `name`; 0 when it is no script. */
static int script_interpreter(const char *start, size_t size, char *name)
{
	size_t from = 2, to;

	if (size < 3 || start[0] != '#' || start[1] != '!') {
		return 0;
	}
	while (from < size && (start[from] == ' ' || start[from] == '\t')) {
		from++;
	}
	for (to = from; to < size && strchr(" \t\n", start[to]) == NULL; to++) {
		name[to - from] = start[to];
	}
	name[to - from] = '\0';
	return to > from;
}

/* Why the program open at fd cannot be served, or NULL. What cannot be read or executed is left to exec to refuse. */
static const char *refuse_file(int fd, const char *path, int depth)
{
	char start[256], name[256];
	const char *reason;
	struct stat status;
	ssize_t size;
	int next;

	if (fstat(fd, &status) == -1 || !S_ISREG(status.st_mode)) {
		return NULL;
	}
	size = pread(fd, start, sizeof(start), 0);
	if (size >= SELFMAG && memcmp(start, ELFMAG, SELFMAG) == 0) {
		reason = refuse_privileged(fd, &status);
		return reason != NULL ? reason : refuse_elf(fd, path);
	}
	if (size <= 0 || depth == 0 || !script_interpreter(start, (size_t)size, name)) {
		return NULL;
	}
	next = open(name, O_RDONLY | O_CLOEXEC);
	if (next == -1) {
		return NULL;
	}
	reason = refuse_file(next, name, depth - 1);
	(void)close(next);
	return reason;
}

static const char *refuse_at(int directory, const char *path, int flags)
{
	int before = errno, fd = openat(directory, path, O_RDONLY | O_CLOEXEC | flags);
	const char *reason = NULL;
	struct stat status;

	if (fd != -1) {
		reason = refuse_file(fd, path, SCRIPT_DEPTH);
		(void)close(fd);
	} else if (errno == EACCES && fstatat(directory, path, &status, 0) == 0 && faccessat(directory, path, X_OK, 0) == 0) {
		reason = "it may not be read, so what it is cannot be known";
	}
	errno = before;
	return reason;
}

/* For the session, which asks before it starts a program: the same judgement. */
EXPORTED const char *vpn_shim_refusal(const char *path);
const char *vpn_shim_refusal(const char *path)
{
	return refuse_at(AT_FDCWD, path, 0);
}

static int complain(const char *path, const char *reason)
{
	struct iovec parts[] = {
		{.iov_base = (char *)(uintptr_t)"vpn: ", .iov_len = 5},
		{.iov_base = (char *)(uintptr_t)path, .iov_len = strlen(path)},
		{.iov_base = (char *)(uintptr_t)" was not started: ", .iov_len = 18},
		{.iov_base = (char *)(uintptr_t)reason, .iov_len = strlen(reason)},
		{.iov_base = (char *)(uintptr_t)", and would go round the tunnel of mode socks; use mode relay or openconnect\n", .iov_len = 77},
	};

	(void)!writev(STDERR_FILENO, parts, sizeof(parts) / sizeof(parts[0]));
	errno = EACCES;
	return -1;
}

static int refused(const char *path)
{
	const char *reason = path == NULL ? NULL : refuse_at(AT_FDCWD, path, 0);

	return reason == NULL ? 0 : complain(path, reason);
}

/* Where execvp would find a program; what it would not find is for it to refuse. */
static const char *locate(const char *file, char *path)
{
	const char *directory = getenv("PATH"), *end;
	size_t length, name = file == NULL ? 0 : strlen(file);
	struct stat status;

	if (name == 0 || strchr(file, '/') != NULL) {
		return file;
	}
	for (directory = directory == NULL ? "/bin:/usr/bin" : directory;; directory = end + 1) {
		end = strchrnul(directory, ':');
		length = (size_t)(end - directory);
		if (length + name + 2 <= PATH_LIMIT) {
			memcpy(path, directory, length);
			path[length] = '/';
			memcpy(path + length + (length != 0), file, name + 1);
			if (stat(path, &status) == 0 && S_ISREG(status.st_mode) && access(path, X_OK) == 0) {
				return path;
			}
		}
		if (*end == '\0') {
			return NULL;
		}
	}
}

static int refused_on_path(const char *file)
{
	char path[PATH_LIMIT];
	int before = errno;
	const char *found = locate(file, path);

	errno = before;
	return refused(found);
}
