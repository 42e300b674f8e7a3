"""The key that guards every path but /health."""

import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from qjax.server.errors import ApiError

OPEN = "/health"


class BearerAuth:
    """Lets through what comes with one of the keys; everything, where there are none.

    Args:
      app: behind it.
      keys: texts; the header must be "Authorization: Bearer KEY".
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]):
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._keys and scope["path"] != OPEN:
            headers = [value for name, value in scope["headers"] if name == b"authorization"]
            if not self._matches(headers):
                raise ApiError(
                    401,
                    "Authorization must be a Bearer header with a valid API key.",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        await self._app(scope, receive, send)

    def _matches(self, headers: list[bytes]) -> bool:
        if len(headers) != 1:
            return False
        scheme, _, given = headers[0].partition(b" ")
        if scheme.lower() != b"bearer":
            return False
        # All are compared, so that the time tells nothing.
        matches = [hmac.compare_digest(given.strip(), key) for key in self._keys]
        return any(matches)
