"""Replicas in Ray, asked at the same time, and left early; test_ray.py runs this and checks what it
prints.

python tests/serve/ray_program.py MODEL, with the folder of ray_serve.py in PYTHONPATH
"""

# pyright: reportMissingImports=false

import asyncio
import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import ray
import ray_serve
from ray import serve

URL = "http://localhost:8000/"
SAMPLING = {"max_tokens": 32, "temperature": 0.8, "seed": 3, "ignore_eos": True}
TEXTS = ["hello", "a longer text to go on with", "x", "once upon a time there was"] * 4
ASKED = [{"prompt": text, **SAMPLING} for text in TEXTS]


class Watched(ray_serve.Model.func_or_class):
    def pages(self) -> list[int]:
        scheduler = self.engine.engine.scheduler
        return [scheduler.blocks.num_free, len(scheduler.running), len(scheduler.waiting)]

    async def answer(self, **asked: Any) -> tuple[str, list[int]]:
        """Who answers, and what."""
        result = await self.generate(**asked)
        return serve.get_replica_context().replica_id.unique_id, list(result.token_ids)


def post(body: Any) -> Any:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return urllib.request.urlopen(urllib.request.Request(URL, data=data), timeout=120)


def text(body: Any) -> str:
    with post(body) as answer:
        return answer.read().decode()


def refused(body: Any) -> tuple[int, str]:
    try:
        post(body)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["error"]
    raise AssertionError("it was taken")


async def together(handle: Any) -> dict[str, Any]:
    who: set[str] = set()
    deadline = time.monotonic() + 60
    while len(who) < 2:  # until the handle knows both
        assert time.monotonic() < deadline, who
        replica, _ = await handle.answer.remote(prompt="hello", max_tokens=1)
        who.add(replica)
    asked = [asyncio.to_thread(text, each) for each in ASKED]
    results = [handle.answer.remote(**each) for each in ASKED]
    by_http = [json.loads(each)["token_ids"] for each in await asyncio.gather(*asked)]
    answered, by_handle = zip(*[await each for each in results], strict=True)
    return {"by http": by_http, "by handle": by_handle, "replicas": len(set(answered))}


async def left_early(handle: Any) -> list[list[int]]:
    """Pages before and while a request runs, and after it was left: one by a handle, one in pieces,
    one by HTTP."""
    endless = {"prompt": "hello", "max_tokens": 100_000, "ignore_eos": True}
    seen = [idle := await handle.pages.remote()]

    async def becomes(wanted: Callable[[list[int]], bool]) -> None:
        deadline = time.monotonic() + 60
        while not wanted(found := await handle.pages.remote()):
            assert time.monotonic() < deadline, found
            await asyncio.sleep(0.02)
        seen.append(found)

    def runs(pages: list[int]) -> bool:
        return pages[1] == 1

    response = handle.generate.remote(**endless)
    await becomes(runs)
    response.cancel()
    await becomes(idle.__eq__)
    pieces = handle.options(stream=True).stream.remote(**endless)
    await anext(pieces)
    await becomes(runs)
    pieces.cancel()
    await becomes(idle.__eq__)
    answer = await asyncio.to_thread(post, {"stream": True, **endless})
    assert answer.readline().startswith(b"data: ")
    await becomes(runs)
    answer.close()
    await becomes(idle.__eq__)
    return seen


async def main(model: str) -> None:
    ray_serve.Model = ray_serve.Model.options(func_or_class=Watched)
    common = {"model": model, "numerics": "exact", "max_num_seqs": 4, "cpus": 0.5}
    handle = serve.run(ray_serve.build(ray_serve.Options(min_replicas=2, **common)))
    found = {"asked": ASKED, **await together(handle)}
    events = text({"stream": True, **ASKED[0]}).splitlines()
    found["events"] = [json.loads(event.removeprefix("data: ")) for event in events if event]
    wrong = [b"{", {"max_tokens": 1}, {"prompt": "x", "n": 2}, {"prompt": ""}]
    found["refused"] = [refused(each) for each in wrong]
    serve.delete("default")
    found["pages"] = await left_early(serve.run(ray_serve.build(ray_serve.Options(**common))))
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        asyncio.run(main(sys.argv[1]))
    finally:
        serve.shutdown()
        ray.shutdown()
