"""Build the helper with cffi: `python3 _native/build.py`, or `make native`."""
import os

from cffi import FFI

DECLARATIONS = """
#define HELPER_VERSION 3  /* NATIVE_VERSION of dockerd.py: one more whenever a declaration here changes */
int sd_notify(const char *address, const char *state);
int netlink_batch(int fd, const void *messages, size_t size, int count, char *text, size_t text_size);
uint64_t crc64(uint64_t crc, const void *data, size_t size);
"""

SOURCE = r"""
#define HELPER_VERSION 3
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
#include <linux/netlink.h>

/* sd_notify(3): one datagram to a Unix socket, '@' for an abstract one.  0, or a negative errno. */
static int sd_notify(const char *address, const char *state)
{
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    size_t length = strlen(address);
    if (length == 0 || length >= sizeof to.sun_path)
        return -EINVAL;
    memcpy(to.sun_path, address, length);
    if (address[0] == '@')
        to.sun_path[0] = 0;
    int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -errno;
    ssize_t sent = sendto(fd, state, strlen(state), MSG_NOSIGNAL, (struct sockaddr *)&to,
                          offsetof(struct sockaddr_un, sun_path) + length);
    int result = sent < 0 ? -errno : 0;
    close(fd);
    return result;
}

/* The kernel's words for a failed request: NLMSGERR_ATTR_MSG behind the capped error message. */
static void extended_text(const struct nlmsghdr *head, char *text, size_t size)
{
    const struct nlmsgerr *error = NLMSG_DATA(head);
    size_t offset = sizeof *head + sizeof *error;
    if (!(head->nlmsg_flags & NLM_F_ACK_TLVS))
        return;
    if (!(head->nlmsg_flags & NLM_F_CAPPED))
        offset += error->msg.nlmsg_len - sizeof error->msg;
    offset = NLMSG_ALIGN(offset);
    while (offset + sizeof(struct nlattr) <= head->nlmsg_len) {
        const struct nlattr *attribute = (const void *)((const char *)head + offset);
        if (attribute->nla_len < sizeof *attribute || offset + attribute->nla_len > head->nlmsg_len)
            return;
        if (attribute->nla_type == NLMSGERR_ATTR_MSG) {
            size_t length = attribute->nla_len - sizeof *attribute;
            if (length >= size)
                length = size - 1;
            memcpy(text, attribute + 1, length);
            text[length] = 0;
            return;
        }
        offset += NLA_ALIGN(attribute->nla_len);
    }
}

/* Send `count` requests in one call, read their acknowledgements: 0, or the first failure's -errno. */
static int netlink_batch(int fd, const void *messages, size_t size, int count, char *text,
                         size_t text_size)
{
    union { struct nlmsghdr head; char bytes[32768]; } answer;
    int result = 0;
    if (send(fd, messages, size, 0) < 0)
        result = -errno;
    while (result == 0 && count > 0) {
        ssize_t received = recv(fd, &answer, sizeof answer, 0);
        if (received < 0) {
            result = -errno;
            break;
        }
        struct nlmsghdr *head = &answer.head;
        for (; NLMSG_OK(head, received); head = NLMSG_NEXT(head, received)) {
            if (head->nlmsg_type != NLMSG_ERROR)
                continue;
            count--;
            int error = ((struct nlmsgerr *)NLMSG_DATA(head))->error;
            if (error && !result) {
                result = error;
                extended_text(head, text, text_size);
            }
        }
    }
    return result;
}

/* CRC-64/GO-ISO of `data` behind what has the sum `crc`, eight bytes at a time. */
static uint64_t crc_table[8][256];

__attribute__((constructor)) static void fill_crc_table(void)
{
    for (int byte = 0; byte < 256; byte++) {
        uint64_t crc = byte;
        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? 0xD800000000000000 : 0);
        crc_table[0][byte] = crc;
    }
    for (int row = 1; row < 8; row++)
        for (int byte = 0; byte < 256; byte++) {
            uint64_t crc = crc_table[row - 1][byte];
            crc_table[row][byte] = crc_table[0][crc & 0xff] ^ crc >> 8;
        }
}

static uint64_t crc64(uint64_t crc, const void *data, size_t size)
{
    const unsigned char *at = data;
    crc = ~crc;
    for (; size >= 8; size -= 8, at += 8) {
        uint64_t sum = 0;
        for (int byte = 0; byte < 8; byte++)
            sum ^= crc_table[7 - byte][(crc >> 8 * byte & 0xff) ^ at[byte]];
        crc = sum;
    }
    while (size--)
        crc = crc_table[0][(crc & 0xff) ^ *at++] ^ crc >> 8;
    return ~crc;
}
"""


def build() -> None:
    """Compile the helper into this directory."""
    builder = FFI()
    builder.cdef(DECLARATIONS)
    builder.set_source("_native._helper", SOURCE)
    builder.compile(tmpdir=os.path.dirname(os.path.dirname(os.path.abspath(__file__))), verbose=False)


if __name__ == "__main__":
    build()
