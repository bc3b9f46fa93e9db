"""A language server of pyright asked for what an editor shows of a name under the pointer."""

import itertools
import json
import shutil
import subprocess

SERVER = shutil.which("pyright-langserver") or shutil.which("basedpyright-langserver")
"""The server on PATH; ``pip install basedpyright`` brings one that needs no Node.js of its own and no network."""


class LanguageServer:
    """A server over one script, whose lines are the expressions that hover is asked for."""

    def __init__(self, root, script):
        self.numbers, self.uri = itertools.count(1), (root / "script_in_an_editor.py").as_uri()
        self.process = subprocess.Popen([SERVER, "--stdio"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        folders = [{"uri": root.as_uri(), "name": root.name}]
        formats = {"textDocument": {"hover": {"contentFormat": ["plaintext"]}}}
        self.ask("initialize", processId=None, rootUri=root.as_uri(), workspaceFolders=folders, capabilities=formats)
        self.tell("initialized")
        document = {"uri": self.uri, "languageId": "python", "version": 1, "text": script}
        self.tell("textDocument/didOpen", textDocument=document)

    def send(self, **message):
        data = json.dumps({"jsonrpc": "2.0", **message}).encode()
        self.process.stdin.write(b"Content-Length: %d\r\n\r\n" % len(data) + data)
        self.process.stdin.flush()

    def tell(self, method, **params):
        self.send(method=method, params=params)

    def read(self):
        length = 0
        while line := self.process.stdout.readline().strip():
            name, value = line.split(b": ")
            length = int(value) if name.lower() == b"content-length" else length
        if not length:
            raise EOFError("the language server has ended")
        return json.loads(self.process.stdout.read(length))

    def ask(self, method, **params):
        """Sends a request and returns its result; questions of the server in between are answered with nothing."""
        number = next(self.numbers)
        self.send(id=number, method=method, params=params)
        while True:
            message = self.read()
            if "method" in message and "id" in message:
                empty = [{} for _ in message["params"].get("items", [])] or None
                self.send(id=message["id"], result=empty)
            elif message.get("id") == number:
                return message["result"]

    def hover(self, line, column):
        """Returns the text over a place of the script, both counted from 0."""
        found = self.ask(
            "textDocument/hover", textDocument={"uri": self.uri}, position=dict(line=line, character=column)
        )
        return found["contents"]["value"] if found else ""

    def close(self):
        self.process.kill()
        self.process.communicate()
