"""The chat page: one file, whose own script and style are all that a browser may run."""

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

from starlette.responses import Response


def response(status: int) -> Response:
    """The page, with a policy that lets it talk to this server alone."""
    html, policy = _page()
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }
    return Response(html, status, headers, media_type="text/html")


@cache
def _page() -> tuple[bytes, str]:
    html = files("qjax.server").joinpath("page.html").read_bytes()

    def digest(tag: bytes) -> str:
        found = re.search(b"<%b>(.*?)</%b>" % (tag, tag), html, re.DOTALL)
        assert found is not None
        return base64.b64encode(hashlib.sha256(found.group(1)).digest()).decode()

    policy = (
        f"default-src 'none'; script-src 'sha256-{digest(b'script')}'; "
        f"style-src 'sha256-{digest(b'style')}'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html, policy
