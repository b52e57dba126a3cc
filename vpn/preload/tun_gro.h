/* Part of tun_from_fd.c: TCP segments that come one after the other become one packet of up to 64 kB.
 *
 * Why: the kernel's work is per packet. A VPN server sends packets of its link's size; the device, made with
 * IFF_VNET_HDR, takes many of them at once (struct virtio_net_hdr, linux/if_tun.h), and the program that receives
 * answers them by one acknowledgement instead of twenty. This is what a network card's GRO does; the rules are those
 * of the kernel's (net/ipv4/tcp_offload.c). Whoever reads cannot tell, but for time. No packet is held while its
 * program sleeps, and one that is not TCP, or not in order, goes as it came.
 */
#include <arpa/inet.h>
#include <linux/virtio_net.h>
#include <netinet/in.h>
#include <stddef.h>
#include <stdint.h>

enum {
	HEADER = sizeof(struct virtio_net_hdr),
	LARGEST = 65535,
	IPV4_HEADER = 20,
	IPV6_HEADER = 40,
	TCP_HEADER = 20,
	CHECKSUM = 16, URGENT = 18, /* where a TCP header has its checksum, its urgent pointer */
	UDP_CHECKSUM = 6,
	DONT_FRAGMENT = 0x40, /* in the byte of an IPv4 header that has the flags */
	FLAG_FIN = 1, FLAG_PSH = 8, FLAG_ACK = 16, FLAG_CWR = 128,
};

struct batch {
	unsigned char data[HEADER + LARGEST + 1];
	size_t length; /* of the packet; 0: nothing is held */
	size_t ip, head; /* bytes of the IP header, and of both */
	size_t size; /* of the first segment's payload: only the last may have less */
	unsigned segments;
	int fixed; /* whether all have the same IPv4 identification; else it counts up */
	uint32_t next; /* the sequence number that follows */
	int closed; /* nothing may be added */
};

static uint16_t load16(const unsigned char *at)
{
	return (uint16_t)(at[0] << 8 | at[1]);
}

static uint32_t load32(const unsigned char *at)
{
	return (uint32_t)load16(at) << 16 | load16(at + 2);
}

static void store16(unsigned char *at, size_t value)
{
	at[0] = (unsigned char)(value >> 8);
	at[1] = (unsigned char)value;
}

/* The Internet checksum's sum (RFC 1071), in the machine's own order of bytes, which it does not depend on. */
static uint64_t sum_of(const unsigned char *data, size_t length)
{
	uint64_t low = 0, high = 0, word;

	for (; length >= 8; data += 8, length -= 8) {
		memcpy(&word, data, 8);
		low += word & 0xffffffff;
		high += word >> 32;
	}
	word = 0;
	memcpy(&word, data, length);
	return low + high + (word & 0xffffffff) + (word >> 32);
}

static uint16_t fold(uint64_t sum)
{
	while (sum >> 16) {
		sum = (sum & 0xffff) + (sum >> 16);
	}
	return (uint16_t)sum;
}

/* What TCP's checksum covers besides the segment: addresses, protocol, length. */
static uint64_t pseudo_sum(const unsigned char *packet, size_t ip, size_t length)
{
	const unsigned char *addresses = packet + (ip == IPV4_HEADER ? 12 : 8);

	return sum_of(addresses, ip == IPV4_HEADER ? 8 : 32) + htons(IPPROTO_TCP) + htons((uint16_t)length);
}

/* The bytes of its IP header when it is a whole TCP segment without IP options or fragments; else 0. */
static size_t tcp_inside(const unsigned char *packet, size_t length)
{
	if (length >= IPV4_HEADER + TCP_HEADER && length <= LARGEST && packet[0] == 0x45) {
		int whole = load16(packet + 2) == length && (load16(packet + 6) & 0x3fff) == 0;

		return whole && packet[9] == IPPROTO_TCP ? IPV4_HEADER : 0;
	}
	if (length >= IPV6_HEADER + TCP_HEADER && length <= LARGEST && packet[0] >> 4 == 6) {
		return load16(packet + 4) == length - IPV6_HEADER && packet[6] == IPPROTO_TCP ? IPV6_HEADER : 0;
	}
	return 0;
}

/* The bytes of both its headers when it carries data, nothing but data, and that intact; else 0. */
static size_t data_inside(const unsigned char *packet, size_t length, size_t ip)
{
	size_t head = ip + (size_t)(packet[ip + 12] >> 4) * 4;

	if (head < ip + TCP_HEADER || head >= length || (packet[ip + 13] & ~FLAG_PSH) != FLAG_ACK) {
		return 0;
	}
	if (fold(pseudo_sum(packet, ip, length - ip) + sum_of(packet + ip, length - ip)) != 0xffff) {
		return 0;
	}
	return ip == IPV4_HEADER && fold(sum_of(packet, ip)) != 0xffff ? 0 : head;
}

/* Whether an IPv4 packet's identification is the one that follows: they count up, or, where nothing may be fragmented,
 * they may all be the same, which the second packet shows.
 */
static int counts_on(struct batch *batch, const unsigned char *packet)
{
	const unsigned char *first = batch->data + HEADER;
	uint16_t distance = (uint16_t)(load16(packet + 4) - load16(first + 4));

	if (batch->segments == 1) {
		batch->fixed = distance == 0 && (packet[6] & DONT_FRAGMENT) != 0;
	}
	return distance == (batch->fixed ? 0 : batch->segments);
}

/* Whether two packets have the same headers but for what their place in the stream changes. */
static int same_stream(struct batch *batch, const unsigned char *packet)
{
	const unsigned char *first = batch->data + HEADER;
	size_t ip = batch->ip;

	if (ip == IPV4_HEADER) { /* not the length, the identification, the checksum */
		if (memcmp(first, packet, 2) != 0 || memcmp(first + 6, packet + 6, 4) != 0 ||
		    memcmp(first + 12, packet + 12, 8) != 0 || !counts_on(batch, packet)) {
			return 0;
		}
	} else if (memcmp(first, packet, 4) != 0 || memcmp(first + 6, packet + 6, 34) != 0) {
		return 0;
	}
	first += ip;
	packet += ip;
	/* ports; what it acknowledges, and the headers' length; the window; the urgent pointer and the options */
	return memcmp(first, packet, 4) == 0 && memcmp(first + 8, packet + 8, 5) == 0 &&
	       memcmp(first + 14, packet + 14, 2) == 0 &&
	       memcmp(first + URGENT, packet + URGENT, batch->head - ip - URGENT) == 0;
}

static void begin(struct batch *batch, const unsigned char *packet, size_t length, size_t ip, size_t head)
{
	memcpy(batch->data + HEADER, packet, length);
	batch->length = length;
	batch->ip = ip;
	batch->head = head;
	batch->size = length - head;
	batch->segments = 1;
	batch->next = load32(packet + ip + 4) + (uint32_t)batch->size;
	batch->closed = (packet[ip + 13] & FLAG_PSH) != 0;
}

/* Hold a packet, alone or behind those that are held; 0 when it cannot be: then what is held must go first, and this
 * one be tried again, or go as it is when nothing is held.
 */
static int add(struct batch *batch, const unsigned char *packet, size_t length)
{
	size_t ip = tcp_inside(packet, length), head = ip ? data_inside(packet, length, ip) : 0, payload = length - head;

	if (head == 0) {
		return 0;
	}
	if (batch->length == 0) {
		begin(batch, packet, length, ip, head);
		return 1;
	}
	if (batch->closed || ip != batch->ip || head != batch->head || payload > batch->size ||
	    batch->length + payload > LARGEST || load32(packet + ip + 4) != batch->next || !same_stream(batch, packet)) {
		return 0;
	}
	memcpy(batch->data + HEADER + batch->length, packet + head, payload);
	batch->length += payload;
	batch->segments++;
	batch->next += (uint32_t)payload;
	batch->data[HEADER + ip + 13] |= packet[ip + 13] & FLAG_PSH;
	batch->closed = payload < batch->size || (packet[ip + 13] & FLAG_PSH) != 0;
	return 1;
}

/* What to write to the device: its bytes, which begin at `data`; nothing is held any more. */
static size_t take(struct batch *batch)
{
	struct virtio_net_hdr header = {0};
	unsigned char *packet = batch->data + HEADER;
	size_t length = batch->length, ip = batch->ip;
	uint16_t sum;

	batch->length = 0;
	if (batch->segments > 1) {
		if (ip == IPV4_HEADER) {
			store16(packet + 2, length);
			store16(packet + 10, 0);
			sum = (uint16_t)~fold(sum_of(packet, ip));
			memcpy(packet + 10, &sum, 2);
		} else {
			store16(packet + 4, length - ip);
		}
		sum = fold(pseudo_sum(packet, ip, length - ip)); /* the rest was checked, segment by segment */
		memcpy(packet + ip + CHECKSUM, &sum, 2);
		header.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM;
		header.gso_type = ip == IPV4_HEADER ? VIRTIO_NET_HDR_GSO_TCPV4 : VIRTIO_NET_HDR_GSO_TCPV6;
		header.hdr_len = (uint16_t)batch->head;
		header.gso_size = (uint16_t)batch->size;
		header.csum_start = (uint16_t)ip;
		header.csum_offset = CHECKSUM;
	}
	memcpy(batch->data, &header, HEADER);
	return HEADER + length;
}
