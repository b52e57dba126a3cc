/* Part of tun_from_fd.c: the reverse of tun_gro.h. The kernel hands over TCP in packets of up to 64 kB, and leaves to
 * us what a network card would do: cutting them into segments, and checksums. The rules are those of the kernel's
 * (tcp_gso_segment). A task chooses what is in its packets: IP options, IPv6 extension headers.
 */

struct super {
	unsigned char data[HEADER + LARGEST + 1];
	size_t length; /* of the packet */
	size_t at; /* of the payload that was not given yet; `length`: all was */
	size_t ip, head; /* bytes before the TCP header, and with it; head 0: it is not to be cut */
	size_t size; /* of a segment's payload */
	uint32_t sequence;
	uint16_t number; /* of the next segment */
	uint16_t identification;
};

static void store32(unsigned char *at, uint32_t value)
{
	store16(at, value >> 16);
	store16(at + 2, value & 0xffff);
}

/* The pseudo header's sum is in the checksum's place. */
static void complete_checksum(unsigned char *packet, size_t length, size_t start, size_t offset)
{
	size_t place = start + offset;
	uint16_t sum;

	if (place + 2 > length) {
		return;
	}
	sum = (uint16_t)~fold(sum_of(packet + start, length - start));
	if (sum == 0 && offset == UDP_CHECKSUM) {
		sum = 0xffff; /* the same in this arithmetic; 0 would say that there is none */
	}
	memcpy(packet + place, &sum, 2);
}

/* Where the TCP header of a packet that is to be cut begins; 0 when it is nothing that was asked for. */
static size_t tcp_begins(const unsigned char *packet, size_t length, const struct virtio_net_hdr *header)
{
	size_t start = header->csum_start;

	if (!(header->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM) || header->csum_offset != CHECKSUM || header->gso_size == 0 ||
	    start < IPV4_HEADER || start + TCP_HEADER > length || length > LARGEST) {
		return 0;
	}
	if (header->gso_type == VIRTIO_NET_HDR_GSO_TCPV4) {
		return packet[0] >> 4 == 4 && (packet[0] & 15) * 4U == start && load16(packet + 2) == length ? start : 0;
	}
	return header->gso_type == VIRTIO_NET_HDR_GSO_TCPV6 && packet[0] >> 4 == 6 && start >= IPV6_HEADER &&
	       load16(packet + 4) == length - IPV6_HEADER ? start : 0;
}

/* Take in what was read, `got` bytes of `super->data`; 0 when it is to be left out. */
static int accept_packet(struct super *super, size_t got)
{
	struct virtio_net_hdr header;
	unsigned char *packet = super->data + HEADER;

	super->at = super->length = super->head = 0;
	if (got <= HEADER) {
		return 0;
	}
	memcpy(&header, super->data, HEADER);
	super->length = got - HEADER;
	if (header.gso_type == VIRTIO_NET_HDR_GSO_NONE) {
		if (header.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM) {
			complete_checksum(packet, super->length, header.csum_start, header.csum_offset);
		}
		return 1;
	}
	super->ip = tcp_begins(packet, super->length, &header);
	super->head = super->ip ? super->ip + (size_t)(packet[super->ip + 12] >> 4) * 4 : 0;
	if (super->head < super->ip + TCP_HEADER || super->head >= super->length) {
		super->length = 0;
		return 0;
	}
	super->at = super->head;
	super->size = header.gso_size;
	super->sequence = load32(packet + super->ip + 4);
	super->identification = load16(packet + 4);
	super->number = 0;
	return 1;
}

/* The headers of the next segment, whose payload is at `super->at`. */
static void write_headers(const struct super *super, unsigned char *segment, size_t length)
{
	size_t ip = super->ip, whole = super->length - ip;
	uint16_t sum;

	memcpy(segment, super->data + HEADER, super->head);
	if (segment[0] >> 4 == 4) {
		store16(segment + 2, length);
		store16(segment + 4, (uint16_t)(super->identification + super->number));
		store16(segment + 10, 0);
		sum = (uint16_t)~fold(sum_of(segment, ip));
		memcpy(segment + 10, &sum, 2);
	} else {
		store16(segment + 4, length - IPV6_HEADER);
	}
	store32(segment + ip + 4, super->sequence + (uint32_t)(super->at - super->head));
	if (super->at != super->head) {
		segment[ip + 13] &= (unsigned char)~FLAG_CWR; /* that is the first one's */
	}
	if (super->at + length - super->head < super->length) {
		segment[ip + 13] &= (unsigned char)~(FLAG_FIN | FLAG_PSH); /* those are the last one's */
	}
	/* The pseudo header's sum, for another length. It is not made anew: with source routing it is not of the addresses
	 * that the IP header has.
	 */
	memcpy(&sum, segment + ip + CHECKSUM, 2);
	sum = fold((uint64_t)sum + (uint16_t)~htons((uint16_t)whole) + htons((uint16_t)(length - ip)));
	memcpy(segment + ip + CHECKSUM, &sum, 2);
}

/* The next packet into `to`, which has room for `room` bytes: what is beyond is cut off, as by read(2), or when it was to be
 * cut into segments that are larger, all of it: then 0.
 */
static size_t give(struct super *super, unsigned char *to, size_t room)
{
	const unsigned char *packet = super->data + HEADER;
	size_t payload = super->length - super->at, length;

	if (super->head == 0) {
		super->at = super->length;
		length = super->length < room ? super->length : room;
		memcpy(to, packet, length);
		return length;
	}
	payload = payload < super->size ? payload : super->size;
	length = super->head + payload;
	if (length > room) {
		super->at = super->length;
		return 0;
	}
	write_headers(super, to, length);
	memcpy(to + super->head, packet + super->at, payload);
	complete_checksum(to, length, super->ip, CHECKSUM);
	super->at += payload;
	super->number++;
	return length;
}
