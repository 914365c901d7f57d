#!/usr/bin/env bash
# numpy.save writes an array of float8_e5m2 without a word, and numpy.load cannot read that file.
# Of the small types of ml_dtypes (jax's own) it is the only one: it alone has the kind "f" and the
# type string "<f1", which numpy writes and does not know. All others are of kind "V" and come back
# as void of the right size, to be viewed as what they were. For the same reason as_strided and
# sliding_window_view refuse float8_e5m2 and take float8_e4m3fn. The bytes of the file are whole:
# they lie behind the header.
#
#   bash findings/float8_e5m2_npy.sh    # installs both into a folder of its own, and fails if it changed
#
# numpy 2.4.6, ml_dtypes 0.6.0, Python 3.11 (2026-11-30)
# seen
#   float8_e5m2    ('f', '<f1', 'ValueError', 'TypeError')
#   float8_e4m3fn  ('V', '<V1', '|V1', 'float8_e4m3fn')
#   bfloat16       ('V', '<V2', '|V2', 'bfloat16')
#   from the bytes behind the header: [1.5, -2.0, 0.25]
# (kind, type string, what numpy.load gives, what as_strided gives)
set -euo pipefail
case ${1:-} in
  -h | --help) awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; exit ;;
esac
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 ml_dtypes==0.6.0
cat >"$folder/check.py" <<'PY'
import ml_dtypes
import numpy as np

NUMBERS = [1.5, -2.0, 0.25]


def attempt(function):
    try:
        return str(function())
    except (TypeError, ValueError) as error:
        return type(error).__name__


seen = {}
for name in ("float8_e5m2", "float8_e4m3fn", "bfloat16"):
    dtype = np.dtype(getattr(ml_dtypes, name))
    array = np.array(NUMBERS, dtype)
    np.save(f"{name}.npy", array)
    loaded = attempt(lambda name=name: np.load(f"{name}.npy").dtype.str)
    strided = attempt(lambda a=array: np.lib.stride_tricks.as_strided(a, (2,)).dtype)
    seen[name] = (dtype.kind, dtype.str, loaded, strided)
    print(f"{name:<14} {seen[name]}")
with open("float8_e5m2.npy", "rb") as file:
    content = file.read()
numbers = np.frombuffer(content[-len(NUMBERS) :], ml_dtypes.float8_e5m2).astype(float).tolist()
print("from the bytes behind the header:", numbers)
assert seen == {
    "float8_e5m2": ("f", "<f1", "ValueError", "TypeError"),
    "float8_e4m3fn": ("V", "<V1", "|V1", "float8_e4m3fn"),
    "bfloat16": ("V", "<V2", "|V2", "bfloat16"),
}, seen
assert numbers == NUMBERS
PY
cd "$folder" && venv/bin/python check.py
