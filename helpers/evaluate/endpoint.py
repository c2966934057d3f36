"""Any OpenAI-compatible endpoint as a judge: a small client that retries, asks in parallel, and keeps every answer.

The key is read from an environment variable at each request; it is never stored, printed or sent on a redirect.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from helpers.store import cached_json, to_json

Messages = list[dict[str, str]]
LONGEST_WAIT = 60.0


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> None:  # a redirect would carry the key to another host
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


@dataclass(frozen=True)
class Endpoint:
    """A model behind POST {url}/chat/completions; `timeout` and `wait` in seconds.

    `key_variable` names the environment variable that holds the key (unset: no key is sent). A busy (429) or failing
    (5xx) server is asked again `retries` times, after `wait`, twice that, and so on, or after what it asks for.
    `workers` requests run at a time. ValueError for an address that is not plain http(s), or for impossible numbers.
    """

    url: str
    model: str
    key_variable: str = "COMPANION_JUDGE_KEY"
    timeout: float = 60.0
    retries: int = 4
    wait: float = 1.0
    workers: int = 4

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"The judge's address must start with http:// or https://, not {parts.scheme!r}.")
        if parts.username or parts.password or parts.query:
            raise ValueError(f"The judge's address must hold no key or query: put the key into {self.key_variable}.")
        if self.timeout <= 0 or self.retries < 0 or self.wait < 0 or self.workers < 1:
            raise ValueError("A judge endpoint needs timeout > 0, retries >= 0, wait >= 0 and workers >= 1.")

    def chat(self, messages: Messages, *, max_tokens: int = 256) -> str:
        """The model's reply at temperature 0; RuntimeError, one sentence each, when there is none.

        Named apart: nothing listens, the key is not accepted, busy or failing through every attempt, a time-out, an
        answer that is not a chat completion. Story: notebooks/01_the_trade_off.
        """
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": max_tokens}
        headers = {"Content-Type": "application/json", **self._authorization()}
        where = self.url.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(where, json.dumps(body).encode(), headers, method="POST")
        for attempt in range(self.retries + 1):
            try:
                with _OPENER.open(request, timeout=self.timeout) as response:
                    return self._reply(response.read())
            except urllib.error.HTTPError as error:
                error.close()
                again = error.code == 429 or error.code >= 500
                if not again or attempt == self.retries:
                    raise RuntimeError(self._refused(error.code, attempt + 1)) from error
                asked = error.headers.get("Retry-After", "")
                time.sleep(min(max(self.wait * 2**attempt, float(asked) if asked.isdigit() else 0.0), LONGEST_WAIT))
            except (OSError, http.client.HTTPException) as error:
                raise RuntimeError(self._unreachable(error)) from error
        raise AssertionError("unreachable")

    def judged(self, rubric: str, questions: Sequence[tuple[Messages, Callable[[str], Any]]], *,
               max_tokens: int = 256, strict: bool = True) -> list[Any]:
        """One parsed verdict per question (messages, parse), asked in parallel; kept by model, rubric and messages.

        `parse` returns what JSON can hold, or None where the reply has no verdict; such a reply is not kept. With
        `strict` it raises RuntimeError once all others are asked and kept; else its verdict is None. An interrupted run
        goes on with what is missing. Texts enter the key as a hash; changed code asks again, as with every artifact.
        """
        keys = [self._key(rubric, messages, max_tokens) for messages, _ in questions]
        found, missing = {}, {}
        for key, question in zip(keys, questions, strict=True):
            if key["messages"] in found or key["messages"] in missing:
                continue
            try:
                found[key["messages"]] = cached_json("judged", key, _absent)
            except LookupError:
                missing[key["messages"]] = (key, *question)
        unread: list[str] = []
        with ThreadPoolExecutor(self.workers) as pool:
            asked = {pool.submit(self.chat, messages, max_tokens=max_tokens): (name, key, parse)
                     for name, (key, messages, parse) in missing.items()}
            try:
                for future in as_completed(asked):
                    name, key, parse = asked[future]
                    reply = future.result()
                    verdict = parse(reply)
                    found[name] = None if verdict is None else cached_json("judged", key, lambda v=verdict: v)
                    unread += [reply] if verdict is None else []
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        if unread and strict:
            raise RuntimeError(f"{len(unread)} answers of {self.model} hold no verdict in the format asked for, like "
                               f"{unread[0][:80]!r}: use a stronger judge, or strict=False to drop them.")
        return [found[key["messages"]] for key in keys]

    def _key(self, rubric: str, messages: Messages, max_tokens: int) -> dict[str, Any]:
        digest = hashlib.sha256(to_json(messages, indent=None).encode()).hexdigest()
        return {"model": self.model, "rubric": rubric, "max_tokens": max_tokens, "messages": digest}

    def _authorization(self) -> dict[str, str]:
        key = os.environ.get(self.key_variable, "").strip()
        if any(not "!" <= letter <= "~" for letter in key):
            raise ValueError(f"The key in {self.key_variable} holds a space or another letter that no key has.")
        return {"Authorization": f"Bearer {key}"} if key else {}

    def _reply(self, content: bytes) -> str:
        try:
            text = json.loads(content)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            raise RuntimeError(self._malformed()) from error
        if not isinstance(text, str):
            raise RuntimeError(self._malformed())
        return text

    def _malformed(self) -> str:
        return f"{self.url} answered with something that is not a chat completion: does its address end in /v1?"

    def _refused(self, code: int, attempts: int) -> str:
        if code in (401, 403):
            return f"{self.url} does not accept the key ({code}): put a valid one into {self.key_variable}."
        if code == 429 or code >= 500:
            return f"{self.url} answered {code} through {attempts} attempts: try again later, what is done is kept."
        return f"{self.url} answered {code}: check its address and the model's name {self.model!r}."

    def _unreachable(self, error: Exception) -> str:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            return f"{self.url} gave no answer within {self.timeout:g} s: raise timeout= or lower workers=."
        return f"Nothing answers at {self.url} ({reason}): start the server or correct the address."


def judge_endpoint(url: str | None = None, model: str | None = None, **how: Any) -> Endpoint:
    """The endpoint of COMPANION_JUDGE_URL and COMPANION_JUDGE_MODEL, or of the arguments; ValueError where none is set.

    `how`: the other fields of `Endpoint`. The key is read from COMPANION_JUDGE_KEY unless `key_variable` names another.
    """
    url, model = url or os.environ.get("COMPANION_JUDGE_URL"), model or os.environ.get("COMPANION_JUDGE_MODEL")
    if not url or not model:
        raise ValueError("No judge endpoint is set: pass url= and model=, or set COMPANION_JUDGE_URL and "
                         "COMPANION_JUDGE_MODEL.")
    return Endpoint(url, model, **how)


def set_endpoint() -> Endpoint | None:
    """The endpoint of the environment, or None where neither variable is set; ValueError where only one is."""
    named = [os.environ.get(name) for name in ("COMPANION_JUDGE_URL", "COMPANION_JUDGE_MODEL")]
    return judge_endpoint() if any(named) else None


def _absent() -> None:
    raise LookupError("This answer has not been judged.")
