#!/usr/bin/env bash
# charset-normalizer takes French in latin-1 for cp1250, so that è would become č; chardet 7 does not.
set -e
site=$(mktemp -d); trap 'rm -rf "$site"' EXIT
"${PYTHON:-python3}" -m pip install -q --target "$site" charset-normalizer==3.5.3 chardet==7.7.0
cd "$site" && PYTHONPATH="$site" "${PYTHON:-python3}" - <<'PY'
import chardet
import charset_normalizer

french = "Les élèves étaient déjà là; où est l'oeuvre? Ça coûte 20 £.\n" * 40
content = french.encode("latin-1")
first = charset_normalizer.from_bytes(content).best().encoding
second = chardet.detect(content)["encoding"]
print(f"charset-normalizer {charset_normalizer.__version__}: {first}; chardet {chardet.__version__}: {second}")
raise SystemExit(0 if content.decode(first) != french and content.decode(second) == french else 1)
PY
