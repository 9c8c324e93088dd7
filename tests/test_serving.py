"""kilonb.core.serving: who is answered, who is refused, and how the server ends."""
import asyncio
import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from tornado.httpclient import HTTPClientError, HTTPRequest
from tornado.websocket import WebSocketError, websocket_connect

from kilonb.core.errors import KiloError
from kilonb.core.serving import LARGEST_MESSAGE, PageServer, Reply, text_reply


def _echo(connection):
    for message in connection: connection.send(message if isinstance(message, bytes) else message.upper())


def _fail(argument):
    raise ValueError("inside")


def _refuse(connection):
    raise KiloError("No such run.")


@pytest.fixture(scope="module")
def server():
    pages = {"": lambda query: Reply(b"index"), "files/": lambda query: text_reply(query["path"]),
             "query": lambda query: text_reply(repr(dict(query))), "broken": _fail}
    server = PageServer(pages, {"echo": _echo, "broken": _fail, "refused": _refuse}).start()
    yield server
    server.stop()


def ask(server, path="", method="GET", body=None, secret=None, **headers):
    line = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    line.request(method, f"/{secret or server.secret}/{path}", body, headers)
    answer = line.getresponse()
    return answer.status, answer.read(), answer.headers


def talk(server, path, *messages, secret=None, **headers):
    """What a web socket answers to each message; the reply to the last may be the code it was closed with."""
    async def run():
        address = f"ws://127.0.0.1:{server.port}/{secret or server.secret}/{path}"
        line = await websocket_connect(HTTPRequest(address, headers=headers, request_timeout=10))
        replies = []
        for message in messages:
            await line.write_message(message, binary=isinstance(message, bytes))
            reply = await asyncio.wait_for(line.read_message(), 10)
            replies.append(line.close_code if reply is None else reply)
        line.close()
        return replies

    return asyncio.run(run())


def test_the_owner_is_answered_and_nothing_is_cached_or_leaked(server):
    status, body, headers = ask(server)
    assert status == 200 and body == b"index" and headers["Cache-Control"] == "no-store"
    assert headers["Referrer-Policy"] == "no-referrer" and headers["X-Content-Type-Options"] == "nosniff"
    assert "default-src 'none'" in headers["Content-Security-Policy"] and headers["Server"] is None
    assert ask(server, method="HEAD")[:2] == (200, b"")


@pytest.mark.parametrize("secret", ["x", "A" * 32, "%00", "%C3%A9", ".."])
def test_a_wrong_secret_finds_nothing(server, secret):
    assert ask(server, secret=secret)[:2] == (404, b"Not found.\n")
    with pytest.raises(HTTPClientError, match="404"): talk(server, "echo", "a", secret=secret)


def test_two_servers_have_different_secrets(server):
    other = PageServer({})
    assert other.secret != server.secret and len(other.secret) >= 22
    other.stop()


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "0.0.0.0", "", "[::1"])
def test_another_hosts_name_is_refused(server, host):
    assert ask(server, Host=host)[0] in (400, 403)


def test_a_forwarded_port_is_answered(server):
    assert ask(server, Host="localhost:8000")[0] == 200 and ask(server, Host="[::1]:9")[0] == 200


@pytest.mark.parametrize("headers", [{"Origin": "http://evil.example"}, {"Origin": "null"},
                                     {"Origin": "https://127.0.0.1"}, {"Sec_Fetch_Site": "cross-site"}])
def test_requests_of_other_sites_are_refused(server, headers):
    assert ask(server, **headers)[0] == 403


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "file://"])
def test_a_socket_of_another_site_is_refused(server, origin):
    with pytest.raises(HTTPClientError, match="403"): talk(server, "echo", "a", Origin=origin)


def test_a_socket_of_our_own_page_answers_texts_and_bytes(server):
    assert talk(server, "echo", "a", b"\0\1", Origin=f"http://127.0.0.1:{server.port}") == ["A", b"\0\1"]


def test_a_socket_is_no_page_and_a_page_no_socket(server):
    assert ask(server, "echo")[0] == 404
    with pytest.raises((HTTPClientError, WebSocketError)): talk(server, "query", "a")


@pytest.mark.parametrize("path", ["files/../broken", "files/..%2f..%2fetc%2fpasswd", "files/%2e%2e/x", "files//etc",
                                  "files/a%00", "files/a%5c..%5cb", "files/%ff/..", "../query", "files/"])
def test_no_path_leaves_its_folder(server, path):
    assert ask(server, path)[0] == 404


def test_a_query_is_decoded(server):
    assert ask(server, "query?a=1&a=2&b=%C3%A9")[1].decode() == "{'a': '2', 'b': 'é'}\n"
    assert ask(server, "query?a=%ff")[0] == 400


def test_a_huge_request_is_refused_and_the_server_goes_on(server):
    for huge in ({"x_long": "a" * 200000}, {"body": b"a" * 200000}):
        with contextlib.suppress(ConnectionError):  # closed before the request was read to its end
            assert ask(server, **huge)[0] in (400, 413, 431)
    assert talk(server, "echo", b"a" * (LARGEST_MESSAGE + 1)) == [1009]
    assert ask(server)[0] == 200


def test_other_methods_are_refused(server):
    assert ask(server, method="POST", body=b"")[0] == 405 and ask(server, method="DELETE")[0] == 405


def test_a_page_or_socket_that_fails_says_so_without_its_source(server, caplog):
    status, body, _ = ask(server, "broken")
    assert status == 500 and b"inside" not in body and "inside" in caplog.text
    assert talk(server, "broken", "a") == [1011] and talk(server, "refused", "a") == [1008]


def test_a_taken_port_is_one_sentence(server):
    with pytest.raises(KiloError, match=r"^Port \d+ of 127.0.0.1 is not free: .* 0 for any free port\.$"):
        PageServer({}, port=server.port)


def test_only_loopback_listens(server):
    assert server._listening[0].getsockname()[0] == "127.0.0.1"
    addresses = {found[4][0] for found in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    for address in {found for found in addresses if not found.startswith("127.")}:
        with pytest.raises(OSError): socket.create_connection((address, server.port), timeout=2)


def test_stop_closes_sockets_and_frees_the_port():
    seen = []
    server = PageServer({}, {"wait": lambda connection: seen.append(connection.receive())}).start()

    async def run():
        line = await websocket_connect(f"ws://127.0.0.1:{server.port}/{server.secret}/wait")
        threading.Thread(target=server.stop).start()
        return await asyncio.wait_for(line.read_message(), 10)

    assert asyncio.run(run()) is None
    for _ in range(100):
        if seen: break
        time.sleep(0.05)
    assert seen == [None]
    server.stop()
    PageServer({}, port=server.port).stop()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_program_without_a_traceback(number):
    code = ("from kilonb.core.serving import PageServer\n"
            "server = PageServer({}).start()\nserver.wait(lambda: print(server.address, flush=True))\nprint('ended')")
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout.readline().startswith("http://127.0.0.1:")
    os.kill(child.pid, number)
    out, errors = child.communicate(timeout=30)
    assert (child.returncode, out, errors) == (0, "ended\n", "")
