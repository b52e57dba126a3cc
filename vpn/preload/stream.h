/* The connection of a program that sends and receives a record of TLS by one call each: several are sent together, and
 * received together.
 *
 * A plain server's packets have 1.5 kB: a call of sendmsg(2), a segment, for each; two of recv(2), its header and what
 * follows. What is held to be sent (`out`) goes when it is as much as one segment offload takes, and at the latest before
 * the program waits. What was received and not asked for yet (`in`) makes the connection count as readable. Records that
 * are large go by themselves: to copy them costs more than the calls.
 *
 * One connection at a time, non-blocking, of a program with one thread; a child that was forked holds nothing of it. It
 * is an order of bytes: nothing may go past what is held, so all calls that move any come here.
 */
#ifndef STREAM_H
#define STREAM_H
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

enum {
	STREAM_ROOM = 65536, /* bytes */
	LARGE_RECORD = 6000,
	RECORD_HEADER = 5, /* bytes; read by itself (RFC 8446, section 5.1) */
	DESCRIPTORS = 1024 /* those beyond are no connection of ours */
};

static ssize_t (*real_recv)(int, void *, size_t, int);
static ssize_t (*real_send)(int, const void *, size_t, int);
static ssize_t (*real_sendmsg)(int, const struct msghdr *, int);

static struct {
	int fd; /* -1: there is none */
	pid_t owner;
	int broken; /* the error that sending met, for the next who sends */
	int large; /* whether the last record received was */
	size_t out_at, out_length, in_at, in_length;
	unsigned char out[STREAM_ROOM], in[STREAM_ROOM];
} stream = {.fd = -1};
static enum kind { UNKNOWN, STREAM, OTHER } kinds[DESCRIPTORS];

/* Whether calls for this descriptor are for the connection: the first non-blocking one that is used is. */
static int is_stream(int fd)
{
	int type = 0, before = errno;
	socklen_t size = sizeof(type);

	if (fd < 0 || fd >= DESCRIPTORS) {
		return 0;
	}
	if (kinds[fd] == UNKNOWN) {
		kinds[fd] = OTHER;
		if (stream.fd == -1 && getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) == 0 && type == SOCK_STREAM &&
		    (fcntl(fd, F_GETFL) & O_NONBLOCK) != 0) {
			kinds[fd] = STREAM;
			stream.fd = fd;
			stream.owner = getpid();
			stream.broken = stream.large = 0;
			stream.out_at = stream.out_length = stream.in_at = stream.in_length = 0;
		}
		errno = before;
	}
	return kinds[fd] == STREAM;
}

/* Send what is held; 0 when the kernel does not take all of it now. */
static int stream_flush(void)
{
	int before = errno;
	ssize_t sent;

	while (stream.out_at < stream.out_length) {
		sent = real_send(stream.fd, stream.out + stream.out_at, stream.out_length - stream.out_at,
				 MSG_NOSIGNAL | MSG_DONTWAIT);
		if (sent >= 0) {
			stream.out_at += (size_t)sent;
		} else if (errno == EAGAIN || errno == ENOBUFS) {
			errno = before;
			return 0;
		} else if (errno != EINTR) {
			stream.broken = errno;
			stream.out_at = stream.out_length;
		}
	}
	stream.out_at = stream.out_length = 0;
	errno = before;
	return 1;
}

static ssize_t stream_send(const struct msghdr *message, int flags)
{
	const struct iovec *parts = message->msg_iov;
	size_t index, count = message->msg_iovlen, total = 0;

	for (index = 0; index < count; index++) {
		total += parts[index].iov_len;
	}
	if ((total > STREAM_ROOM - stream.out_length || total >= LARGE_RECORD) && !stream_flush()) {
		errno = EAGAIN;
		return -1;
	}
	if (stream.broken) {
		errno = stream.broken;
		return -1;
	}
	if (total >= LARGE_RECORD) {
		return real_sendmsg(stream.fd, message, flags);
	}
	for (index = 0; index < count; index++) {
		memcpy(stream.out + stream.out_length, parts[index].iov_base, parts[index].iov_len);
		stream.out_length += parts[index].iov_len;
	}
	return (ssize_t)total;
}

static int stream_has_input(void)
{
	return stream.fd != -1 && stream.in_at < stream.in_length;
}

static ssize_t stream_receive(void *data, size_t length, int flags)
{
	ssize_t count;

	if (length > RECORD_HEADER) {
		stream.large = length >= LARGE_RECORD;
	}
	if (!stream_has_input()) {
		if (stream.large || length >= LARGE_RECORD || flags != 0) {
			return real_recv(stream.fd, data, length, flags);
		}
		count = real_recv(stream.fd, stream.in, sizeof(stream.in), 0);
		if (count <= 0) {
			return count;
		}
		stream.in_at = 0;
		stream.in_length = (size_t)count;
	}
	if (length > stream.in_length - stream.in_at) {
		length = stream.in_length - stream.in_at;
	}
	memcpy(data, stream.in + stream.in_at, length);
	if (!(flags & MSG_PEEK)) {
		stream.in_at += length;
	}
	return (ssize_t)length;
}

/* Its number may be another file's next. */
static void stream_close(int fd)
{
	if (fd < 0 || fd >= DESCRIPTORS) {
		return;
	}
	if (kinds[fd] == STREAM) {
		if (getpid() == stream.owner) {
			stream_flush();
		}
		stream.fd = -1;
	}
	kinds[fd] = UNKNOWN;
}
#endif
