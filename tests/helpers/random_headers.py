"""Random PROXY headers, most of them damaged, for hypothesis."""

from hypothesis import strategies as st

from helpers.header_table import VALID
from helpers.proxy_headers import inet, tlv, unix, v2

blocks = st.lists(
    st.tuples(st.sampled_from([1, 2, 3, 4, 5, 0x20, 0x30, 0xE0, 0xEA, 0x99]), st.binary(max_size=12)),
    max_size=3,
).map(lambda found: b"".join(tlv(number, value) for number, value in found))
families = {
    0x11: inet(),
    0x21: inet("2001:db8::1"),
    0x31: unix(),
    0x12: inet(),
    0x00: b"",
    0x10: inet(),
    0x41: b"",
}
binary = st.builds(
    lambda family, block, command, checksum: v2(families[family] + block, family, command, checksum),
    st.sampled_from(sorted(families)),
    blocks,
    st.sampled_from([0x21, 0x21, 0x21, 0x20, 0x22]),
    st.booleans(),
)
hosts = st.one_of(
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map(str),
    st.text("0123456789abcdefF:.", max_size=20),
    st.lists(st.sampled_from(["", "0", "1", "ffff", "00001", "1.2.3.4"]), max_size=9).map(":".join),
)
lines = st.builds(
    lambda kind, source, destination, ports: f"PROXY {kind} {source} {destination} {ports}\r\n".encode(),
    st.sampled_from(["TCP4", "TCP6", "UNKNOWN"]),
    hosts,
    hosts,
    st.sampled_from(["1 2", "0 65535", "65536 1", "01 1", "1", "1  1"]),
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Give a header, of the table or any, with up to two bytes that are others, and what follows."""
    data = bytearray(
        draw(st.one_of(binary, lines, st.sampled_from([header for header, _ in VALID.values()])))
    )
    for _ in range(draw(st.integers(0, 2))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data) + draw(st.sampled_from([b"", b"\r\n", b"payload"]))
