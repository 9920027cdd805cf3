"""The Hugging Face hub: requests to it end, also if it never answers."""

if __name__ == "__main__":
    raise SystemExit("parts/hub.py is no command: README.md lists the commands")

import functools

PATIENCE = 20  # seconds that the hub may be silent for


@functools.cache
def limit_waits() -> None:
    """Make requests to the hub, also those of `datasets`, end if it is silent for PATIENCE seconds.

    Without that most of them wait for ever: they are sent with a limit of None, which counts more
    than the client's own. So the limit is set in each request.
    """
    from huggingface_hub import get_session, set_client_factory

    default = get_session()

    def limit(request) -> None:
        limits = request.extensions["timeout"]
        for phase, seconds in limits.items():
            limits[phase] = min(seconds or PATIENCE, PATIENCE)

    hooks = {**default.event_hooks, "request": [*default.event_hooks["request"], limit]}

    def make_client():
        return type(default)(event_hooks=hooks, follow_redirects=True)

    set_client_factory(make_client)
