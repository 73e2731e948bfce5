#!/usr/bin/env bash
# Draw docs/images/report.png, the top of a report, for README. Needs chromium; nothing is measured.
#
#   python -m mtptrain +recipe=distill output_dir=RUN
#   scripts/report_picture.sh RUN
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(mktemp -d)
trap 'rm -r "$out"' EXIT
python -m mtptrain +recipe=report path="$1" output_dir="$out" > /dev/null
chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1100,1000 \
    --screenshot="$out/report.png" "file://$out/report.html" 2> "$out/log"
mkdir -p docs/images
# 64 colours are enough for text and two series, and make a third of the bytes.
python -c 'import sys; from PIL import Image; Image.open(sys.argv[1]).convert("RGB").quantize(64).save(sys.argv[2], optimize=True)' \
    "$out/report.png" docs/images/report.png
