/* The calls by which the program of tun_from_fd.c waits, a part of it: what is held goes before, and what it was not
 * given yet counts as there. Where the kernel has no room for what its connection sends, these calls wait for that too,
 * without telling.
 */
/* Before the program waits, for the device too (`watched`) or not: whether there is something for it already. */
static int has_packets(int watched)
{
	if (watched && !waits) {
		waits = 1;
		if (real_ioctl(duplicate, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6) != 0) {
			perror("tun_from_fd: TUNSETOFFLOAD"); /* then the kernel does all of it, and packets come one by one */
		}
	}
	return watched && got.at < got.length;
}

/* How long the program, which would wait for `limit` ms (-1: for ever), may wait before we look again. */
static int at_most(int limit, int ready, int left)
{
	int most = ready ? 0 : RETRY;

	return (ready || left) && (limit < 0 || limit > most) ? most : limit;
}

int select(int count, fd_set *readable, fd_set *writable, fd_set *special, struct timeval *limit)
{
	struct timeval soon = {0};
	int device, input, unsent, most, ready;
	fd_set own;

	load();
	if (!headers || duplicate == -1) {
		return real_select(count, readable, writable, special, limit);
	}
	device = has_packets(duplicate < count && readable != NULL && FD_ISSET(duplicate, readable));
	input = stream_has_input() && stream.fd < count && readable != NULL && FD_ISSET(stream.fd, readable);
	unsent = !stream_flush() && !(stream.fd < count && writable != NULL && FD_ISSET(stream.fd, writable));
	most = at_most(-1, device || input, !flush());
	soon.tv_usec = most * 1000;
	if (most != -1 && (limit == NULL || timercmp(limit, &soon, >))) {
		limit = &soon;
	}
	if (unsent) {
		FD_ZERO(&own);
		writable = writable != NULL ? writable : &own;
		FD_SET(stream.fd, writable);
		count = count > stream.fd ? count : stream.fd + 1;
	}
	ready = real_select(count, readable, writable, special, limit);
	if (ready == -1) {
		return ready;
	}
	if (unsent && FD_ISSET(stream.fd, writable)) {
		stream_flush();
		FD_CLR(stream.fd, writable);
		ready--;
	}
	if (device && !FD_ISSET(duplicate, readable)) {
		FD_SET(duplicate, readable);
		ready++;
	}
	if (input && !FD_ISSET(stream.fd, readable)) {
		FD_SET(stream.fd, readable);
		ready++;
	}
	return ready;
}

static struct pollfd *watched_by_poll(struct pollfd *descriptors, nfds_t count, int fd)
{
	nfds_t index = 0;

	while (index < count && (fd == -1 || descriptors[index].fd != fd ||
				 !(descriptors[index].events & (POLLIN | POLLRDNORM)))) {
		index++;
	}
	return index < count ? &descriptors[index] : NULL;
}

static int tell_poll(struct pollfd *one)
{
	int new = one->revents == 0;

	one->revents |= one->events & (POLLIN | POLLRDNORM);
	return new;
}

int poll(struct pollfd *descriptors, nfds_t count, int limit)
{
	struct pollfd *device, *input;
	int sent, ready;

	load();
	if (!headers || duplicate == -1) {
		return real_poll(descriptors, count, limit);
	}
	device = watched_by_poll(descriptors, count, duplicate);
	device = has_packets(device != NULL) ? device : NULL;
	input = stream_has_input() ? watched_by_poll(descriptors, count, stream.fd) : NULL;
	sent = stream_flush();
	ready = real_poll(descriptors, count, at_most(limit, device || input, !flush() || !sent));
	if (ready != -1) {
		ready += device ? tell_poll(device) : 0;
		ready += input ? tell_poll(input) : 0;
	}
	return ready;
}

int epoll_ctl(int fd, int operation, int watched, struct epoll_event *event)
{
	int done;

	load();
	done = real_epoll_ctl(fd, operation, watched, event);
	if (done == 0 && watched >= 0 && watched < DESCRIPTORS) {
		watches[watched].epoll = operation == EPOLL_CTL_DEL ? 0 : fd + 1;
		if (operation != EPOLL_CTL_DEL) {
			watches[watched].event = *event;
		}
		if (watched == stream.fd) {
			armed = 0;
		}
	}
	return done;
}

/* How this epoll watches a descriptor for this; NULL: not at all. */
static const struct epoll_event *watched_by(int epoll, int fd, uint32_t events)
{
	const struct watch *watch = fd >= 0 && fd < DESCRIPTORS ? &watches[fd] : NULL;

	return watch != NULL && watch->epoll == epoll + 1 && (watch->event.events & events) ? &watch->event : NULL;
}

/* Have the kernel tell when there is room for what is held to be sent, or no longer. */
static void watch_room(int epoll, int wanted)
{
	struct epoll_event event;

	if (armed == wanted || stream.fd == -1 || watches[stream.fd].epoll != epoll + 1) {
		return;
	}
	event = watches[stream.fd].event;
	event.events |= wanted ? EPOLLOUT : 0;
	armed = real_epoll_ctl(epoll, EPOLL_CTL_MOD, stream.fd, &event) == 0 && wanted;
}

/* Tell that it is readable; the number of events. */
static int tell_epoll(struct epoll_event *events, int ready, int count, const struct epoll_event *watch)
{
	int index;

	for (index = 0; index < ready && events[index].data.u64 != watch->data.u64; index++) {
	}
	if (index == count) {
		return ready; /* no room: next time */
	}
	if (index == ready) {
		events[ready++] = (struct epoll_event){.events = 0, .data = watch->data};
	}
	events[index].events |= EPOLLIN;
	return ready;
}

/* Take out what only we had asked for; the number of events. */
static int without_room(struct epoll_event *events, int ready)
{
	int index, kept = 0;

	for (index = 0; index < ready; index++) {
		if (events[index].data.u64 == watches[stream.fd].event.data.u64 && (events[index].events & EPOLLOUT)) {
			events[index].events &= ~(uint32_t)EPOLLOUT;
		}
		if (events[index].events != 0) {
			events[kept++] = events[index];
		}
	}
	return kept;
}

int epoll_wait(int fd, struct epoll_event *events, int count, int limit)
{
	const struct epoll_event *device, *input;
	int sent, ready;

	load();
	if (!headers || duplicate == -1) {
		return real_epoll_wait(fd, events, count, limit);
	}
	device = watched_by(fd, duplicate, EPOLLIN);
	device = has_packets(device != NULL) ? device : NULL;
	input = stream_has_input() ? watched_by(fd, stream.fd, EPOLLIN) : NULL;
	sent = stream_flush();
	watch_room(fd, !sent && !watched_by(fd, stream.fd, EPOLLOUT));
	ready = real_epoll_wait(fd, events, count, at_most(limit, device || input, !flush() || !(sent || armed)));
	if (ready == -1) {
		return ready;
	}
	if (armed) {
		watch_room(fd, !stream_flush());
		ready = without_room(events, ready);
	}
	ready = device ? tell_epoll(events, ready, count, device) : ready;
	return input ? tell_epoll(events, ready, count, input) : ready;
}
