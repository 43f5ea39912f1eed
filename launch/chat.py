"""Talk to a model in a terminal: one that a server has, or one that is loaded here.

    python -m launch.chat http://localhost:8000
    python -m launch.chat runs/smollm2/base --system "Answer in one sentence."

Owns the conversation and what its commands do. Who answers is chat_models.py's, what a person sees and types
chat_screen.py's. Against a server nothing is imported that takes time.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launch.command_line import exit_status
from launch.options import CHAT, KEY_VARIABLE, ChatOptions, check_model

if TYPE_CHECKING:
    from launch.chat_models import ChatModel, Message
    from launch.chat_screen import Screen

HELP = '''/system [TEXT]   set the system message; without a text, show it
/reset           forget the conversation, but for the system message
/model [NAME]    ask another of the server's models; without a name, list them
/save [FILE]     write the conversation as JSON, which /v1/chat/completions takes
/help            show this
/quit            leave, as Ctrl-D does
Ctrl-C stops an answer. Arrows bring back earlier lines. A line that ends with \\ goes on in the next one; lines
between """ and """ are one message. //TEXT is the message /TEXT.'''


class Chat:
    """One conversation, and the commands of who leads it."""

    def __init__(self, model: ChatModel, screen: Screen, system: str | None = None) -> None:
        self.model, self.screen, self.system = model, screen, system
        self.turns: list[Message] = []

    @property
    def messages(self) -> list[Message]:
        """All that is sent: the system message, if there is one, and the turns."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *self.turns]

    def run(self) -> None:
        """Answer until whoever writes leaves."""
        while (text := self.screen.read()) is not None:
            num_turns = len(self.turns)
            try:
                if not text.startswith("/") or text.startswith("//"):
                    self._answer(text.removeprefix("/"))
                elif not self._obey(*text[1:].split(maxsplit=1)):
                    return
            except KeyboardInterrupt:  # before an answer's beginning or behind its end
                del self.turns[num_turns:]

    def _answer(self, text: str) -> None:
        """Have a message answered; one that cannot be is forgotten, so that it may be sent again."""
        self.turns.append({"role": "user", "content": text})
        try:
            answer = self.screen.show(self.model.answer(self.messages))
        except (ValueError, OSError) as error:
            self.turns.pop()
            self.screen.complain(str(error))
            return
        self.turns.append({"role": "assistant", "content": answer})

    def _obey(self, name: str = "", argument: str = "") -> bool:
        """Do what a command says; False to leave."""
        argument = argument.strip()
        try:
            match name:
                case "quit" | "exit":
                    return False
                case "help":
                    self.screen.tell(HELP)
                case "reset":
                    self.turns.clear()
                    self.screen.tell("the conversation is empty")
                case "system":
                    self.system = argument or self.system
                    self.screen.tell("no system message" if self.system is None else f"system: {self.system}")
                case "model":
                    self._choose(argument)
                case "save":
                    self._save(Path(argument or time.strftime("chat-%Y%m%d-%H%M%S.json")).expanduser())
                case _:
                    self.screen.complain(f"there is no command /{name}; /help lists them")
        except (ValueError, OSError) as error:
            self.screen.complain(str(error))
        return True

    def _choose(self, name: str) -> None:
        names = self.model.names()
        if not name:
            self.screen.tell("\n".join(f"{'*' if each == self.model.name else ' '} {each}" for each in names))
        elif name in names:
            self.model.name = name
            self.screen.tell(f"model: {name}")
        else:
            self.screen.complain(f"there is no model {name}, only {', '.join(names)}")

    def _save(self, path: Path) -> None:
        with open(path, "x", encoding="utf-8") as file:  # what is there is kept
            json.dump({"model": self.model.name, "messages": self.messages}, file, indent=2, ensure_ascii=False)
            file.write("\n")
        self.screen.tell(f"saved {len(self.messages)} messages in {path}")


@contextlib.contextmanager
def chat_model(options: ChatOptions) -> Iterator[ChatModel]:
    """Who answers. Raises ValueError and OSError where nobody can."""
    from launch import chat_models

    if options.is_remote:
        yield chat_models.ServedModel(options)
        return
    try:
        check_model(options.model)
    except ValueError as error:
        raise ValueError(f"{error}; a server's address begins with http://") from None
    from launch.inference import load_model

    with load_model(options.local, lambda plan: print(plan, file=sys.stderr) if options.plan else None) as model:
        if not model.codec.has_chat_template:
            raise ValueError(f"{options.model} has no chat template: continue a text instead, with launch.generate")
        yield chat_models.LoadedChatModel(model, options.local)


def run(options: ChatOptions) -> None:
    """Talk until whoever writes leaves."""
    if "RANK" in os.environ:
        raise ValueError("a person talks to one process: start it without torchrun, or start a server with it")
    if importlib.util.find_spec("rich") is None:
        raise ImportError("talking needs a package that is not here: pip install 'yafsdp_like[serve]' (no rich)")
    from dataclasses import replace

    from launch.chat_screen import Screen

    options = replace(options, api_key=options.api_key or os.environ.get(KEY_VARIABLE))
    screen = Screen(options.markdown)
    with chat_model(options) as model:
        screen.say(f"talking to {model.name}; /help lists commands")
        Chat(model, screen, options.system).run()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit status."""
    options = CHAT.answer(sys.argv[1:] if arguments is None else arguments)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
    return options if isinstance(options, int) else exit_status(run, options)


if __name__ == "__main__":
    sys.exit(main())
