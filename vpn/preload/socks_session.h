/* Part of socks.c: what is asked of the forwarder, and the mapping it gives. */

static int open_session(void)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	struct timeval limit = {.tv_sec = ANSWER_SECONDS};
	struct ucred peer = {0};
	socklen_t size = sizeof(peer);
	size_t length = strlen(session);
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

	if (fd == -1) {
		return -1;
	}
	memcpy(address.sun_path + 1, session, length);
	(void)setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
	(void)setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));
	length += offsetof(struct sockaddr_un, sun_path) + 1;
	while (REAL(connect)(fd, (struct sockaddr *)&address, (socklen_t)length) == -1) {
		if (errno != EINTR) {
			goto refused;
		}
	}
	/* Anybody may take the name of a session that has ended. */
	if (REAL(getsockopt)(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) == -1 || peer.uid != geteuid()) {
		goto refused;
	}
	return fd;
refused:
	(void)close(fd);
	errno = ENETDOWN;
	return -1;
}

/* Send a request and receive its answer and, into `passed` unless it is NULL, a descriptor. The answer's size, or -1. */
static ssize_t ask(const void *request, size_t length, void *answer, size_t limit, int *passed)
{
	union {
		struct cmsghdr header;
		char space[CMSG_SPACE(sizeof(int))];
	} control;
	struct iovec part = {.iov_base = answer, .iov_len = limit};
	struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
	struct cmsghdr *header;
	ssize_t size;
	int fd = open_session();

	if (fd == -1) {
		return -1;
	}
	if (passed != NULL) {
		message.msg_control = control.space;
		message.msg_controllen = sizeof(control.space);
	}
	do {
		size = REAL(sendto)(fd, request, length, MSG_NOSIGNAL, NULL, 0);
	} while (size == -1 && errno == EINTR);
	if (size != -1) {
		do {
			size = recvmsg(fd, &message, MSG_CMSG_CLOEXEC);
		} while (size == -1 && errno == EINTR);
	}
	(void)close(fd);
	if (passed != NULL && size > 0) {
		header = CMSG_FIRSTHDR(&message);
		if (header == NULL || header->cmsg_type != SCM_RIGHTS) {
			size = 0;
		} else {
			memcpy(passed, CMSG_DATA(header), sizeof(int));
		}
	}
	if (size <= 0) {
		errno = ENETDOWN;
		return -1;
	}
	return size;
}

/* The mapping; NULL (errno ENETDOWN) when the session is gone. Needs no lock: who comes second drops what he made. */
static struct table *get_table(void)
{
	struct table *mine = __atomic_load_n(&table, __ATOMIC_ACQUIRE), *theirs = NULL;
	char answer;
	int fd = -1;

	if (mine != NULL) {
		return mine;
	}
	if (ask("T", 1, &answer, 1, &fd) != 1) {
		return NULL;
	}
	mine = mmap(NULL, sizeof(*mine), PROT_READ, MAP_SHARED, fd, 0);
	(void)close(fd);
	if (mine == MAP_FAILED || mine->header.magic != MAGIC) {
		errno = ENETDOWN;
		return NULL;
	}
	if (!__atomic_compare_exchange_n(&table, &theirs, mine, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
		(void)munmap(mine, sizeof(*mine));
		return theirs;
	}
	return mine;
}
