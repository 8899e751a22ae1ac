"""Talk to a running ComfyUI server: post a prompt, follow its progress, fetch its outputs."""

import asyncio
import json
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable

import aiohttp

# Called as (node id, value, total): once with (id, 0, 0) when a node starts, then for each step that it reports.
Progress = Callable[[str, int, int], None]


class PromptRejected(RuntimeError):
    """The server did not accept all of the prompt; the message is the server's."""


class NodeFailed(RuntimeError):
    """A node raised; the message is the node's own."""

    def __init__(self, node_type: str, message: str):
        super().__init__(message)
        self.node_type = node_type


class Interrupted(RuntimeError):
    """The prompt was cancelled."""


class Client:
    """One ComfyUI server at `url`, without a slash at the end."""

    def __init__(self, url: str):
        self.url = url
        self.id = uuid.uuid4().hex

    def get(self, path: str):
        """GET and decode JSON; urllib's HTTPError passes through."""
        return json.loads(self.fetch(path))

    def fetch(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return answer.read()

    def object_info(self) -> dict:
        return self.get("/object_info")

    def picture(self, image: dict) -> bytes:
        """The file of one entry of an output's `images`."""
        return self.fetch("/view?" + urllib.parse.urlencode(image))

    def interrupt(self) -> None:
        """Stop the running prompt, as the Cancel button does."""
        urllib.request.urlopen(urllib.request.Request(self.url + "/interrupt", method="POST"), timeout=60).close()

    def post(self, prompt: dict, progress: Progress | None = None) -> dict:
        """Run a prompt (API format) to its end; return {node id: output}.

        Raises PromptRejected, NodeFailed or Interrupted.
        """
        return asyncio.run(self._post(prompt, progress or (lambda node, value, total: None)))

    async def _post(self, prompt: dict, progress: Progress) -> dict:
        async with aiohttp.ClientSession() as session:
            socket_url = f"{self.url}/ws?clientId={self.id}"
            async with session.ws_connect(socket_url, max_msg_size=0) as socket:
                prompt_id = await self._queue(session, prompt)
                await follow(socket, prompt_id, progress)
        return self.get(f"/history/{prompt_id}")[prompt_id]["outputs"]

    async def _queue(self, session: aiohttp.ClientSession, prompt: dict) -> str:
        body = {"prompt": prompt, "client_id": self.id}
        async with session.post(self.url + "/prompt", json=body) as answer:
            reply = await answer.json()
        if answer.status != 200 or reply["node_errors"]:  # with errors in one branch the server runs the others
            raise PromptRejected(rejection(reply))
        return reply["prompt_id"]


async def follow(socket: aiohttp.ClientWebSocketResponse, prompt_id: str, progress: Progress) -> None:
    """Read events until the server has finished the prompt and stored its outputs; raise the prompt's error."""
    failure = None
    async for message in socket:
        if message.type != aiohttp.WSMsgType.TEXT:  # previews
            continue
        event = json.loads(message.data)
        kind, data = event["type"], event["data"]
        if data.get("prompt_id") != prompt_id:
            continue
        if kind == "executing" and data["node"] is None:
            if failure:
                raise failure
            return
        if kind == "executing":
            progress(data["node"], 0, 0)
        elif kind == "progress":
            progress(data["node"], data["value"], data["max"])
        elif kind == "execution_error":
            failure = NodeFailed(data["node_type"], data["exception_message"].strip())
        elif kind == "execution_interrupted":
            failure = Interrupted("The prompt was cancelled.")
    raise ConnectionError("ComfyUI closed the connection before the prompt was done; its log says why.")


def rejection(reply: dict) -> str:
    """The server's answer to a prompt that it did not accept, as one line."""
    details = [f"{node['class_type']}: {error['message']}: {error['details']}"
               for node in reply.get("node_errors", {}).values() for error in node["errors"]]
    return "; ".join(details) or "{message} {details}".format(**reply["error"]).strip()
