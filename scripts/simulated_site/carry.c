/* One direction of the shaped wire (shape.py): packets from one TUN to another, delayed and at a rate.
 *
 *   carry SOURCE TARGET BYTES_PER_SECOND DELAY_NS QUEUE_NS
 *
 * Both descriptors are non-blocking. A packet leaves when the wire has sent all before it, and arrives DELAY_NS later;
 * what would wait longer than QUEUE_NS for the wire is dropped. It ends when the source does.
 *
 * The wire's end does what network cards do: it interrupts at most once in GATHER, and joins the segments of a stream
 * that have arrived by then (GRO). Without it a receiver's kernel, which answers every second segment, spends more on
 * packets of 1.5 kB than the tunnel that is measured. */
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

enum { PACKET = HEADER + LARGEST + 64, BURST = 64, GATHER = 100000 /* ns */ };

struct packet {
    struct packet *next;
    int64_t due;
    size_t length;
    unsigned char data[];
};

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

static struct packet *first, **last = &first;
static struct batch joined;
static int64_t rests_until;

static void keep(const unsigned char *data, size_t length, int64_t due) {
    struct packet *packet = malloc(sizeof *packet + length);
    if (!packet)
        return; /* dropped, as by a full router */
    packet->next = NULL;
    packet->due = due;
    packet->length = length;
    memcpy(packet->data, data, length);
    *last = packet;
    last = &packet->next;
}

static void put(int target, const unsigned char *data, size_t length) {
    /* An error means that the device is not up yet, or its queue is full: the packet is lost. */
    if (write(target, data, length) < 0 && errno == EBADF)
        exit(1);
}

static void put_joined(int target) {
    if (joined.length > 0) {
        size_t length = take(&joined);
        put(target, joined.data, length);
    }
}

/* Whether it is held, to be joined with what follows. Large packets, and those whose checksum is still to be computed,
 * come from this machine and were never on a wire: they are what a network card would have made of them. */
static int hold(int target, const struct packet *packet) {
    static const struct virtio_net_hdr plain;
    if (packet->length <= HEADER || memcmp(packet->data, &plain, HEADER) != 0)
        return 0;
    size_t length = packet->length - HEADER;
    if (add(&joined, packet->data + HEADER, length))
        return 1;
    put_joined(target);
    return add(&joined, packet->data + HEADER, length);
}

/* Whether anything was due. */
static int deliver(int target, int64_t now) {
    int any = first && first->due <= now;
    while (first && first->due <= now) {
        struct packet *packet = first;
        if (!hold(target, packet)) {
            put_joined(target);
            put(target, packet->data, packet->length);
        }
        first = packet->next;
        if (!first)
            last = &first;
        free(packet);
    }
    put_joined(target);
    return any;
}

/* Wait until a packet is due or comes; after one, GATHER first. */
static void await(int source) {
    struct pollfd poll = {source, POLLIN, 0};
    int64_t now = now_ns(), until = now < rests_until ? rests_until : first ? first->due : now;
    int64_t left = until > now ? until - now : 0;
    struct timespec wait = {left / 1000000000, left % 1000000000};
    ppoll(&poll, now < rests_until ? 0 : 1, now < rests_until || first ? &wait : NULL, NULL);
}

int main(int argc, char **argv) {
    static unsigned char buffer[PACKET];
    if (argc != 6)
        return 2;
    int source = atoi(argv[1]), target = atoi(argv[2]);
    double rate = atof(argv[3]);
    int64_t delay = atoll(argv[4]), queue = atoll(argv[5]), wire_free = 0;
    prctl(PR_SET_TIMERSLACK, 1000UL, 0, 0, 0);
    for (;;) {
        await(source);
        int busy = 0;
        for (int burst = 0; burst < BURST; burst++, busy = 1) {
            ssize_t length = read(source, buffer, sizeof buffer);
            if (length < 0 && (errno == EAGAIN || errno == EINTR))
                break;
            if (length <= 0)
                return 1;
            int64_t now = now_ns();
            if (wire_free - now >= queue)
                continue; /* dropped */
            if (wire_free < now)
                wire_free = now;
            wire_free += (int64_t)((double)length / rate * 1e9);
            keep(buffer, (size_t)length, wire_free + delay);
        }
        if (deliver(target, now_ns()) || busy)
            rests_until = now_ns() + GATHER;
    }
}
