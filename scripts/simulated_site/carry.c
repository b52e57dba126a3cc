/* One direction of the shaped wire (shape.py): packets from one TUN to another, delayed and at a rate.
 *
 *   carry SOURCE TARGET BYTES_PER_SECOND DELAY_NS QUEUE_NS
 *
 * Both descriptors are non-blocking. A packet leaves when the wire has sent all before it, and arrives DELAY_NS later;
 * what would wait longer than QUEUE_NS for the wire is dropped. It ends when the source does. */
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

enum { LARGEST = 65536 + 64 };

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

static void deliver(int target, int64_t now) {
    while (first && first->due <= now) {
        struct packet *packet = first;
        /* An error means that the device is not up yet, or its queue is full: the packet is lost. */
        if (write(target, packet->data, packet->length) < 0 && errno == EBADF)
            exit(1);
        first = packet->next;
        if (!first)
            last = &first;
        free(packet);
    }
}

int main(int argc, char **argv) {
    static unsigned char buffer[LARGEST];
    if (argc != 6)
        return 2;
    int source = atoi(argv[1]), target = atoi(argv[2]);
    double rate = atof(argv[3]);
    int64_t delay = atoll(argv[4]), queue = atoll(argv[5]), wire_free = 0;
    prctl(PR_SET_TIMERSLACK, 1000UL, 0, 0, 0);
    for (;;) {
        int64_t now = now_ns();
        deliver(target, now);
        struct timespec wait = {0, 0};
        if (first) {
            int64_t left = first->due > now ? first->due - now : 0;
            wait.tv_sec = left / 1000000000;
            wait.tv_nsec = left % 1000000000;
        }
        struct pollfd poll = {source, POLLIN, 0};
        if (ppoll(&poll, 1, first ? &wait : NULL, NULL) <= 0)
            continue;
        for (int burst = 0; burst < 16; burst++) {
            ssize_t length = read(source, buffer, sizeof buffer);
            if (length < 0 && (errno == EAGAIN || errno == EINTR))
                break;
            if (length <= 0)
                return 1;
            now = now_ns();
            if (wire_free - now >= queue)
                continue; /* dropped */
            if (wire_free < now)
                wire_free = now;
            wire_free += (int64_t)((double)length / rate * 1e9);
            keep(buffer, (size_t)length, wire_free + delay);
        }
    }
}
