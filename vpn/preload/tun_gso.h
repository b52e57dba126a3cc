/* Part of tun_from_fd.c: the reverse of tun_gro.h. The kernel hands over TCP in packets of up to 64 kB, and leaves to
 * us what a network card would do: cutting them into segments, and checksums.
 */

struct super {
	unsigned char data[HEADER + LARGEST + 1];
	size_t length; /* of the packet */
	size_t at; /* of the payload that was not given yet; `length`: all was */
	size_t ip, head, size;
	uint32_t sequence;
	uint16_t number; /* of the next segment */
	uint16_t identification;
};

static void store32(unsigned char *at, uint32_t value)
{
	store16(at, value >> 16);
	store16(at + 2, value & 0xffff);
}

static void complete_checksum(unsigned char *packet, size_t length, const struct virtio_net_hdr *header)
{
	size_t start = header->csum_start, place = start + header->csum_offset;
	uint16_t sum;

	if (place + 2 > length) {
		return;
	}
	sum = (uint16_t)~fold(sum_of(packet + start, length - start)); /* the pseudo header's sum is in its place */
	if (sum == 0) {
		sum = 0xffff; /* the same in this arithmetic; in UDP, 0 would say that there is none */
	}
	memcpy(packet + place, &sum, 2);
}

/* Take in what was read, `got` bytes of `super->data`; 0 when it is to be left out. */
static int accept_packet(struct super *super, size_t got)
{
	struct virtio_net_hdr header;
	unsigned char *packet = super->data + HEADER;

	super->at = super->length = 0;
	if (got <= HEADER) {
		return 0;
	}
	memcpy(&header, super->data, HEADER);
	super->length = got - HEADER;
	if (header.gso_type == VIRTIO_NET_HDR_GSO_NONE) {
		if (header.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM) {
			complete_checksum(packet, super->length, &header);
		}
		super->head = 0;
		super->size = super->length;
		return 1;
	}
	super->ip = tcp_inside(packet, super->length);
	super->head = super->ip ? super->ip + (size_t)(packet[super->ip + 12] >> 4) * 4 : 0;
	super->size = header.gso_size;
	if (super->head < super->ip + TCP_HEADER || super->head >= super->length || super->size == 0) {
		super->at = super->length = 0; /* nothing that was asked for */
		return 0;
	}
	super->at = super->head;
	super->sequence = load32(packet + super->ip + 4);
	super->identification = load16(packet + 4);
	super->number = 0;
	return 1;
}

/* The headers of the next segment, whose payload is at `super->at`. */
static void write_headers(const struct super *super, unsigned char *segment, size_t length)
{
	size_t ip = super->ip;
	uint16_t sum;

	memcpy(segment, super->data + HEADER, super->head);
	if (ip == IPV4_HEADER) {
		store16(segment + 2, length);
		store16(segment + 4, (uint16_t)(super->identification + super->number));
		store16(segment + 10, 0);
		sum = (uint16_t)~fold(sum_of(segment, ip));
		memcpy(segment + 10, &sum, 2);
	} else {
		store16(segment + 4, length - ip);
	}
	store32(segment + ip + 4, super->sequence + (uint32_t)(super->at - super->head));
	if (super->at + length - super->head < super->length) {
		segment[ip + 13] &= (unsigned char)~(FLAG_FIN | FLAG_PSH); /* those are the last one's */
	}
	store16(segment + ip + CHECKSUM, 0);
}

/* The next packet into `to`, which has room for `room` bytes: what is beyond is cut off, as by read(2). */
static size_t give(struct super *super, unsigned char *to, size_t room)
{
	const unsigned char *packet = super->data + HEADER;
	size_t payload = super->length - super->at, length;
	uint16_t sum;

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
	sum = (uint16_t)~fold(pseudo_sum(to, super->ip, length - super->ip) + sum_of(to + super->ip, length - super->ip));
	memcpy(to + super->ip + CHECKSUM, &sum, 2);
	super->at += payload;
	super->number++;
	return length;
}
