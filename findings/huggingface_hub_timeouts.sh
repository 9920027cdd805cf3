#!/usr/bin/env bash
# huggingface_hub lists a repository's files with a time limit of None, which counts more than the limit of the
# client that set_client_factory gives it.
set -e
site=$(mktemp -d); trap 'rm -rf "$site"' EXIT
"${PYTHON:-python3}" -m pip install -q --target "$site" huggingface_hub==2.4.0
cd "$site" && HF_HOME="$site" PYTHONPATH="$site" "${PYTHON:-python3}" - <<'PY'
import huggingface_hub

client_class = type(huggingface_hub.get_session())
limits = []


def note(request):
    limits.append(request.extensions["timeout"]["read"])
    raise ValueError("no network is needed")


huggingface_hub.set_client_factory(lambda: client_class(timeout=5, event_hooks={"request": [note]}))
for call in (
    lambda api: api.dataset_info("some/texts", timeout=5),
    lambda api: list(api.list_repo_tree("some/texts", repo_type="dataset")),
):
    try:
        call(huggingface_hub.HfApi())
    except ValueError:
        pass
print(f"huggingface_hub {huggingface_hub.__version__}: limits of its requests: {limits} s")
raise SystemExit(0 if 5 in limits and limits[-1] is None else 1)
PY
