"""The image registry that ``vm.repo(image_hash=… | image_tag=…)`` asks: every image is known here.

Imports `misbehave`, `provider`, `rest`. Nothing is ever downloaded: a provider of this market runs all
images alike, on the host's programs, if it takes them at all (`ProviderSpec.images`). Public, as the real registry is: yapapi sends it no key.
"""

from __future__ import annotations

from aiohttp import web

from cpodfs.devnet.misbehave import Misbehaviour
from cpodfs.devnet.provider import image_hash
from cpodfs.devnet.rest import Problem


class RegistryApi:
    def __init__(self, misbehave: Misbehaviour) -> None:
        self._misbehave = misbehave

    def routes(self, root: str = "/registry") -> list[web.RouteDef]:
        image = web.get(f"{root}/images/{{name}}", self.image, allow_head=True)
        return [web.get(f"{root}/v1/image/info", self.info), image]

    async def info(self, request: web.Request) -> web.Response:
        """Where an image is and what it hashes to. Give ``hash`` or ``tag``."""
        if self._misbehave.unknown_image:
            raise Problem(404, "no such image (injected)")
        given, tag = request.query.get("hash"), request.query.get("tag")
        if bool(given) == bool(tag):
            raise Problem(400, "either hash or tag is expected")
        digest = given or image_hash(str(tag))
        url = str(request.url.origin().with_path(f"/registry/images/{digest}.gvmi"))
        return web.json_response({"http": url, "https": url, "sha3": digest, "size": 0})

    async def image(self, _request: web.Request) -> web.Response:
        return web.Response(body=b"", content_type="application/octet-stream")
