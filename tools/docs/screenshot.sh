#!/bin/sh
# Draws the picture of README.md anew: the head of the gallery's MISMATCH, in Chromium, with few colours.
# usage: tools/docs/screenshot.sh    (after ./run docs, or kvdrift-bench gallery)
set -eu
cd -- "$(dirname -- "$0")/../.."
page=$PWD/build/gallery/mismatch.html
[ -f "$page" ] || { echo "no $page; run kvdrift-bench gallery first" >&2; exit 2; }
browser=$(command -v chromium || command -v chromium-browser || command -v google-chrome) || { echo "needs Chromium" >&2; exit 3; }
profile=$(mktemp -d)
trap 'rm -rf "$profile"' EXIT
"$browser" --headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --hide-scrollbars \
    --user-data-dir="$profile" --window-size=1080,860 --screenshot="$profile/shot.png" "file://$page" >/dev/null 2>&1
python=${KVDRIFT_PYTHON:-.venv/bin/python}
mkdir -p docs/images
"$python" - "$profile/shot.png" docs/images/report.png <<'PYTHON'
import struct, sys, zlib

# An indexed PNG out of the browser's RGB one, with the standard library alone: the colours of the page are few.
data = open(sys.argv[1], "rb").read()
at, parts, packed = 8, {}, b""
while at < len(data):
    (size,) = struct.unpack(">I", data[at : at + 4])
    name, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
    parts[name] = body
    packed += body if name == b"IDAT" else b""
    at += 12 + size
width, height, depth, kind = struct.unpack(">IIBB", parts[b"IHDR"][:10])
n = {2: 3, 6: 4}[kind]
raw, stride, rows, before = zlib.decompress(packed), width * n, [], bytearray(width * n)
for y in range(height):
    line = bytearray(raw[y * (stride + 1) + 1 : (y + 1) * (stride + 1)])
    how = raw[y * (stride + 1)]
    for x in range(stride):
        left = line[x - n] if x >= n else 0
        up, corner = before[x], before[x - n] if x >= n else 0
        if how == 1:
            add = left
        elif how == 2:
            add = up
        elif how == 3:
            add = (left + up) // 2
        elif how == 4:
            guess = left + up - corner
            add = min((left, up, corner), key=lambda v: abs(guess - v))
        else:
            add = 0
        line[x] = (line[x] + add) & 255
    rows.append(line)
    before = line
counts = {}
pixels = [[tuple(line[x : x + 3]) for x in range(0, stride, n)] for line in rows]
for line in pixels:
    for colour in line:
        counts[colour] = counts.get(colour, 0) + 1
palette = sorted(counts, key=counts.get, reverse=True)[:64]
nearest = {c: min(range(len(palette)), key=lambda i: sum((a - b) ** 2 for a, b in zip(c, palette[i]))) for c in counts}
flat = b"".join(b"\0" + bytes(nearest[c] for c in line) for line in pixels)
def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
with open(sys.argv[2], "wb") as file:
    file.write(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)))
    file.write(chunk(b"PLTE", b"".join(map(bytes, palette))) + chunk(b"IDAT", zlib.compress(flat, 9)) + chunk(b"IEND", b""))
PYTHON
ls -l docs/images/report.png
