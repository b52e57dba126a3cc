/* The shaped wire (shape.py): packets between two TUNs, delayed and at a rate, each way for itself.
 *
 *   carry ONE OTHER BYTES_PER_SECOND DELAY_NS QUEUE_NS
 *
 * Both descriptors are non-blocking. A packet leaves when the wire has sent all before it, and arrives DELAY_NS later;
 * what would wait longer than QUEUE_NS for the wire is dropped. It ends when a device does.
 *
 * The wire's ends do what network cards do: while many packets come they interrupt once in GATHER (4000 times a second
 * are what e1000 calls bulk), and join the segments of a stream that have arrived by then (GRO); where few come, each is
 * carried at once. What is measured shares its processors with this process: woken for every packet of a stream, it takes
 * more of them than many a tunnel. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#include "tun_gro.h"

enum { PACKET = HEADER + LARGEST + 64, BURST = 256, GATHER = 250000, SPAN = 1000000 /* ns */, FEW = 6 /* packets in a span */ };

struct packet {
    struct packet *next;
    int64_t due;
    size_t length;
    unsigned char data[];
};

struct way {
    int source, target;
    int64_t wire_free; /* when it has sent all it was given */
    struct packet *first, **last;
    struct batch joined;
};

static double rate;
static int64_t delay, queue;

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

static void keep(struct way *way, const unsigned char *data, size_t length, int64_t due) {
    struct packet *packet = malloc(sizeof *packet + length);
    if (!packet)
        return; /* dropped, as by a full router */
    packet->next = NULL;
    packet->due = due;
    packet->length = length;
    memcpy(packet->data, data, length);
    *way->last = packet;
    way->last = &packet->next;
}

/* How many packets came; exits when the device is gone. */
static int take_in(struct way *way) {
    static unsigned char buffer[PACKET];
    for (int taken = 0;; taken++) {
        ssize_t length = taken < BURST ? read(way->source, buffer, sizeof buffer) : 0;
        if (taken == BURST || (length < 0 && (errno == EAGAIN || errno == EINTR)))
            return taken;
        if (length <= 0)
            exit(1);
        int64_t now = now_ns();
        if (way->wire_free - now >= queue)
            continue; /* dropped */
        if (way->wire_free < now)
            way->wire_free = now;
        way->wire_free += (int64_t)((double)length / rate * 1e9);
        keep(way, buffer, (size_t)length, way->wire_free + delay);
    }
}

static void put(const struct way *way, const unsigned char *data, size_t length) {
    /* An error means that the device is not up yet, or its queue is full: the packet is lost. */
    if (write(way->target, data, length) < 0 && errno == EBADF)
        exit(1);
}

static void put_joined(struct way *way) {
    if (way->joined.length > 0) {
        size_t length = take(&way->joined);
        put(way, way->joined.data, length);
    }
}

/* Whether it is held, to be joined with what follows. Large packets, and those whose checksum is still to be computed,
 * come from this machine and were never on a wire: they are what a network card would have made of them. */
static int hold(struct way *way, const struct packet *packet) {
    static const struct virtio_net_hdr plain;
    if (packet->length <= HEADER || memcmp(packet->data, &plain, HEADER) != 0)
        return 0;
    size_t length = packet->length - HEADER;
    if (add(&way->joined, packet->data + HEADER, length))
        return 1;
    put_joined(way);
    return add(&way->joined, packet->data + HEADER, length);
}

/* How many packets were due. */
static int deliver(struct way *way, int64_t now) {
    int delivered = 0;
    for (; way->first && way->first->due <= now; delivered++) {
        struct packet *packet = way->first;
        if (!hold(way, packet)) {
            put_joined(way);
            put(way, packet->data, packet->length);
        }
        way->first = packet->next;
        if (!way->first)
            way->last = &way->first;
        free(packet);
    }
    put_joined(way);
    return delivered;
}

/* Whether many packets come, by how many were handled just now. */
static int is_stream(int handled, int64_t now) {
    static int64_t began;
    static int count, before;
    if (now - began >= SPAN) {
        before = now - began < 2 * SPAN ? count : 0;
        count = 0;
        began = now;
    }
    count += handled;
    return count > FEW || before > FEW;
}

/* Wait until a packet is due or comes; in a stream, GATHER after the last first. */
static void await(const struct way ways[2], int64_t rests_until) {
    struct pollfd sources[2] = {{ways[0].source, POLLIN, 0}, {ways[1].source, POLLIN, 0}};
    int64_t now = now_ns(), until = INT64_MAX;
    int rests = now < rests_until;
    for (int i = 0; i < 2; i++)
        if (ways[i].first && ways[i].first->due < until)
            until = ways[i].first->due;
    if (rests)
        until = rests_until;
    int64_t left = until > now ? until - now : 0;
    struct timespec wait = {left / 1000000000, left % 1000000000};
    ppoll(sources, rests ? 0 : 2, until < INT64_MAX ? &wait : NULL, NULL);
}

int main(int argc, char **argv) {
    static struct way ways[2];
    if (argc != 6)
        return 2;
    for (int i = 0; i < 2; i++) {
        ways[i].source = atoi(argv[1 + i]);
        ways[i].target = atoi(argv[2 - i]);
        ways[i].last = &ways[i].first;
    }
    rate = atof(argv[3]);
    delay = atoll(argv[4]);
    queue = atoll(argv[5]);
    prctl(PR_SET_TIMERSLACK, 1000UL, 0, 0, 0);
    for (int64_t rests_until = 0;;) {
        await(ways, rests_until);
        int handled = 0;
        for (int i = 0; i < 2; i++)
            handled += take_in(&ways[i]) + deliver(&ways[i], now_ns());
        int64_t now = now_ns();
        if (handled && is_stream(handled, now))
            rests_until = now + GATHER;
    }
}
