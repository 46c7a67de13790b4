"""The models that the server offers by name: loaded on first use, a few at a time, and again if their files change."""

import asyncio
import contextlib
import time
import warnings
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from dataset.tokenization import ChatTokenizer
from model.batching import Engine
from scripts.model_catalog import Entry, find_adapters, find_models, printable, stamp_of
from scripts.openai_schema import ApiError


class Offer(NamedTuple):
    """A model, alone or with an adapter (a name in out/lora/, or a .pth file)."""

    entry: Entry
    lora_name: str | None = None

    @property
    def key(self) -> tuple[Path, str | None]:
        """Distinguishes it from all others; two folders may have the same name."""
        return self.entry.path, self.lora_name

    @property
    def root(self) -> str:
        return self.entry.name + (f":{self.lora_name}" if self.lora_name else "")


@dataclass
class LoadedModel:
    name: str  # the offer's root, or its path if another one in memory has that name
    engine: Engine
    tokenizer: ChatTokenizer
    stamp: tuple = ()  # of the files that it was loaded from
    users: int = 0  # HTTP requests that use it now
    last_used: float = 0.0
    replaced: bool = False  # its files have changed and the new weights are loaded: close it after its last user


class ModelPool:
    """The default model, which is loaded first and stays, under `name`, and those in out_dir and folders.

    load: makes an engine and a tokenizer from an offer; it runs in a thread. max_models: engines in memory; the next
    one replaces the least recently used. With 1 only the default is offered.
    """

    def __init__(
        self,
        name: str,
        default: Offer,
        out_dir: Path,
        folders: tuple[Path, ...],
        load: Callable[[Offer], tuple[Engine, ChatTokenizer]],
        max_models: int,
    ):
        self.name, self.default, self.load, self.max_models = name, default, load, max_models
        self._out_dir, self._folders = out_dir, folders
        self._loaded: dict[tuple[Path, str | None], LoadedModel] = {}  # by the offer's key
        self._loading = asyncio.Lock()
        self._tasks: set[asyncio.Task] = set()

    def offers(self) -> dict[str, Offer]:
        """Return all models that can be asked for now; training may have written more since the start."""
        offers = {self.name: self.default}
        if self.max_models == 1:
            return offers
        entry = self.default.entry
        adapters = find_adapters(entry.out_dir, entry.hidden_size, entry.use_moe)
        offers |= {f"{self.name}:{adapter}": Offer(entry, adapter) for adapter in adapters}
        for entry in find_models(self._out_dir, self._folders):
            if entry.path != self.default.entry.path:
                if entry.name in offers:
                    entry = replace(entry, name=printable(str(entry.path)))
                found = [Offer(entry), *(Offer(entry, adapter) for adapter in entry.adapters)]
                offers |= {offer.root: offer for offer in found}
        if self.default.lora_name:
            offers.setdefault(self.default.entry.name, Offer(self.default.entry))
        return offers

    def find(self, name: str) -> Offer:
        """Return the offer of that name, which for the default may be its file's name. ApiError 404 lists all names."""
        offers = self.offers()
        if found := offers.get(name) or {offer.root: offer for offer in offers.values()}.get(name):
            return found
        message = f"there is no model {name!r} here; there are: {', '.join(offers)}"
        raise ApiError(404, message, "model", "model_not_found")

    @contextlib.asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[LoadedModel]:
        """Yield the loaded model, which stays in memory while it is used. If its files have changed, load it again."""
        offer = self.default if name == self.name else await asyncio.to_thread(self.find, name)
        stamp = await asyncio.to_thread(stamp_of, offer.entry, offer.lora_name)
        if offer.key not in self._loaded or self._loaded[offer.key].stamp != stamp:
            await self._bring(offer)
        while offer.key not in self._loaded:  # another request needed the memory
            await self._bring(offer)
        model = self._loaded[offer.key]
        model.users += 1
        try:
            yield model
        finally:
            model.users -= 1
            model.last_used = time.monotonic()
            if model.replaced and not model.users:
                await asyncio.to_thread(model.engine.close)

    async def _bring(self, offer: Offer) -> None:
        """Load an offer's model. If the client goes meanwhile, loading continues for the next one."""
        task = asyncio.create_task(self._load(offer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await asyncio.shield(task)

    async def _load(self, offer: Offer) -> None:
        async with self._loading:
            old, stamp = self._loaded.get(offer.key), await asyncio.to_thread(stamp_of, offer.entry, offer.lora_name)
            if old is not None and old.stamp == stamp:
                return
            if old is None and len(self._loaded) >= self.max_models:
                idle = {key: m for key, m in self._loaded.items() if not m.users and key != self.default.key}
                if not idle:
                    message = f"{self.max_models} models are in memory and busy; --max_models allows no more"
                    raise ApiError(503, message, "model", "overloaded", {"Retry-After": "5"})
                oldest = min(idle, key=lambda key: idle[key].last_used)
                await asyncio.to_thread(self._loaded.pop(oldest).engine.close)
            try:
                engine, tokenizer = await asyncio.to_thread(self.load, offer)
            except (ValueError, OSError, RuntimeError) as error:  # torch raises the last when memory runs out
                if old is None:
                    message = f"{offer.root} cannot be loaded: {error}"
                    raise ApiError(503, message, "model", "model_not_loaded") from error
                warnings.warn(f"{offer.root} answers with the weights it has: {error}", stacklevel=2)
                old.stamp = stamp
                return
            self.add(offer, engine, tokenizer, stamp)
            if old is not None:
                old.replaced = True
                if not old.users:
                    await asyncio.to_thread(old.engine.close)

    def add(self, offer: Offer, engine: Engine, tokenizer: ChatTokenizer, stamp: tuple | None = None) -> None:
        """Keep a loaded model. stamp: of its files before they were loaded."""
        name, adapter = offer.root, f":{offer.lora_name}" if offer.lora_name else ""
        if any(model.name == name for key, model in self._loaded.items() if key != offer.key):
            name = f"{offer.entry.path}{adapter}"
        stamp = stamp_of(offer.entry, offer.lora_name) if stamp is None else stamp
        self._loaded[offer.key] = LoadedModel(name, engine, tokenizer, stamp, last_used=time.monotonic())

    def context_of(self, offer: Offer) -> int | None:
        """Return the tokens of a conversation with its answer, if the model is in memory."""
        model = self._loaded.get(offer.key)
        return model and model.engine.context_length

    @property
    def engine_of_default(self) -> Engine:
        return self._loaded[self.default.key].engine

    def stats(self) -> dict[str, dict]:
        """Return the statistics of each model's engine."""
        return {model.name: model.engine.stats() for model in self._loaded.values()}

    def close(self) -> None:
        for model in self._loaded.values():
            model.engine.close()
