"""Inputs and outputs of every kind through a real queue."""

import datetime
import ipaddress
import os
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

import hpcq

ODD = ["in put.txt", "ü 日本.txt", "-rf", "a'b\"c$(d)", "new\nline", "deep/er/file", ".hidden"]


def test_a_command_with_files(one):
    (one.data / "a.txt").write_text("text")
    task = hpcq.Task("wc -c < in.txt > out.txt", inputs={"in.txt": one.data / "a.txt"})
    task.set(outputs={"out.txt": one.data / "new/dir/n.txt"})
    assert one.run(task).outcome == "success"
    assert (one.data / "new/dir/n.txt").read_text().strip() == "4"


def test_a_function_with_files_has_its_own_sandbox_as_directory(one):
    def work(name):
        text = Path(name).read_text()
        Path("out").write_text(text[::-1])
        return sorted(path.name for path in Path().iterdir())

    task = hpcq.PythonTask(work, "in").set(inputs={"in": hpcq.Buffer("abc")}, outputs={"out": one.data / "o"})
    assert one.run(task).result() == ["in", "out"]
    assert (one.data / "o").read_text() == "cba"
    assert one.run(hpcq.PythonTask(os.listdir)).result() == []


@pytest.mark.parametrize("name", ODD)
def test_odd_names_on_both_sides(one, name):
    place = one.data / name.replace("deep", "deep2")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(name)

    def work():
        Path("o " + name.replace("/", "_")).write_text(Path(name).read_text())

    output = "o " + name.replace("/", "_")
    task = hpcq.PythonTask(work).set(inputs={name: place}, outputs={output: one.data / ("new " + output)})
    assert one.run(task).result() is None
    assert (one.data / ("new " + output)).read_text() == name


def test_directories_both_ways(one):
    source = one.data / "d"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "x").write_text("X")
    (source / "run").write_text("#!/bin/sh\necho ran > made/here\n")
    (source / "run").chmod(0o755)
    target = one.data / "o"
    target.mkdir()
    (target / "old").write_text("old")
    command = "mkdir made && d/run && cp d/sub/x made/ && ln -s x made/l && mkdir made/empty"
    assert one.run(hpcq.Task(command, inputs={"d": source}, outputs={"made": target})).result() == ""
    assert (target / "here").read_text() == "ran\n"
    assert (target / "l").readlink() == Path("x")
    assert sorted(path.name for path in target.iterdir()) == ["empty", "here", "l", "x"]


def test_executables_stay_so_and_empty_files_too(one, umask):
    (one.data / "run").write_text("#!/bin/sh\n: > out; chmod +x out\n")
    (one.data / "run").chmod(0o755)
    task = hpcq.Task("./run", inputs={"run": one.data / "run"}, outputs={"out": one.data / "out"})
    assert one.run(task).result() == ""
    assert (one.data / "out").stat().st_mode & 0o777 == 0o755
    assert (one.data / "out").stat().st_size == 0


def test_a_task_may_write_to_its_inputs_the_next_one_sees_none_of_it(one):
    for _ in range(2):
        task = hpcq.Task("cat in; echo more >> in", inputs={"in": hpcq.Buffer("text\n")})
        assert one.run(task).result() == "text\n"


def test_a_link_into_the_cache_is_no_copy(one):
    (one.data / "big").write_bytes(bytes(1 << 20))
    task = hpcq.Task("stat -c '%h %a' in", inputs={"in": hpcq.File(one.data / "big", link=True)})
    assert one.run(task).result().split() == ["2", "444"]


def test_uncached_inputs_are_not_kept(one):
    (one.data / "a").write_text("once")
    assert one.run(hpcq.Task("cat a", inputs={"a": hpcq.File(one.data / "a", cache=False)})).result() == "once"
    assert not list(one.directory.glob("node/hpcq-cache-*/objects/*"))


def test_sandboxes_do_not_stay(one):
    task = hpcq.Task("mkdir d && touch d/x && chmod 0 d; pwd", inputs={"a": hpcq.Buffer("")})
    sandbox = one.run(task).result().strip()
    one.queue.close()
    one.pilots[0].wait(90)
    assert not Path(sandbox).exists()


def together(site, count):
    """What a command does to go on only when so many run at once: no pilot is done before the last has begun."""
    marks = site.directory / "marks"
    marks.mkdir()
    return f"touch {marks}/$HPCQ_TASK_ID; until test $(ls {marks} | wc -l) -ge {count}; do sleep 0.05; done"


def test_the_same_input_is_fetched_once_for_all_pilots_of_a_node(site):
    for _ in range(3):
        site.pilot()
    site.ready(3)
    (site.data / "f").write_bytes(os.urandom(1 << 20))
    meet = together(site, 6)
    tasks = [hpcq.Task(f"wc -c < f; {meet}", inputs={"f": site.data / "f"}) for _ in range(6)]
    for task in tasks:
        site.queue.submit(task)
    while not site.queue.empty():
        assert site.queue.wait(90).output.strip() == str(1 << 20)
    assert len({task.pilot for task in tasks}) == 3
    assert list(site.given().values()) == [1]


def test_other_nodes_get_it_from_each_other(site):
    for number in range(6):
        site.pilot(node=f"node{number}", cores=1)
    site.ready(6)
    (site.data / "f").write_bytes(os.urandom(3 << 20))
    meet = together(site, 6)
    tasks = [hpcq.Task(f"sha1sum < f; {meet}", inputs={"f": site.data / "f"}) for _ in range(6)]
    for task in tasks:
        site.queue.submit(task)
    outputs = {site.queue.wait(90).result() for _ in tasks}
    assert len(outputs) == 1
    assert len({task.pilot for task in tasks}) == 6
    assert max(site.given().values()) <= 3


def test_a_new_pilot_gives_what_its_node_has_already(site):
    (site.data / "f").write_bytes(os.urandom(3 << 20))
    first = site.pilot(node="node1", cores=1)
    assert site.run(hpcq.Task("test -s f", inputs={"f": site.data / "f"})).outcome == "success"
    first.terminate()
    first.wait(90)
    for node in ("node1", "node2"):
        site.pilot(node=node, cores=1)
    site.ready(2)
    meet = together(site, 2)
    tasks = [hpcq.Task(f"sha1sum < f; {meet}", inputs={"f": site.data / "f"}) for _ in range(2)]
    for task in tasks:
        site.queue.submit(task)
    assert len({site.queue.wait(90).result() for _ in tasks}) == 1
    assert len({task.pilot for task in tasks}) == 2
    assert list(site.given().values()) == [1]


def test_a_small_cache_still_serves_what_does_not_fit(site):
    site.pilot("--cache-size", "1")
    for number in range(4):
        (site.data / f"f{number}").write_bytes(bytes([number]) * 700_000)
        task = hpcq.Task("wc -c < f", inputs={"f": site.data / f"f{number}"})
        assert site.run(task).result().strip() == "700000"
    (site.data / "large").write_bytes(bytes(3_000_000))
    assert site.run(hpcq.Task("wc -c < f", inputs={"f": site.data / "large"})).result().strip() == "3000000"
    held = sum(path.stat().st_size for path in site.directory.glob("node/hpcq-cache-*/objects/*"))
    assert 0 < held <= 1 << 20


def test_many_small_ones(one):
    tasks = [
        hpcq.Task("cat a > o", inputs={"a": hpcq.Buffer(str(n))}, outputs={"o": one.data / f"o{n}"}) for n in range(100)
    ]
    for task in tasks:
        one.queue.submit(task)
    while not one.queue.empty():
        assert one.queue.wait(90).outcome == "success"
    assert [(one.data / f"o{n}").read_text() for n in range(100)] == [str(n) for n in range(100)]


# --- other tasks' outputs ---


def test_outputs_of_other_tasks(one):
    first = hpcq.Task("echo one | tee kept > path", outputs={"kept": hpcq.Temp(), "path": one.data / "p"})
    one.queue.submit(first)
    both = {"a": first.file("kept"), "b": first.file("path"), "c": first.outputs["kept"]}
    assert one.run(hpcq.Task("cat a b c", inputs=both)).result() == "one\none\none\n"
    assert first.done


def test_a_chain_and_a_directory_that_stays(one):
    step = hpcq.Task("mkdir d && echo 0 > d/n", outputs={"d": hpcq.Temp()})
    one.queue.submit(step)
    for _ in range(3):
        following = hpcq.Task("cp -r i d && echo $(($(cat i/n)+1)) > d/n", inputs={"i": step.file("d")})
        following.set(outputs={"d": hpcq.Temp()})
        one.queue.submit(following)
        step = following
    assert one.run(hpcq.Task("cat d/n", inputs={"d": step.file("d")})).result() == "3\n"


def test_a_producer_that_fails_fails_its_consumers_by_name(one):
    first = hpcq.Task("exit 3", outputs={"o": hpcq.Temp()})
    one.queue.submit(first)
    second = hpcq.Task("cat o", inputs={"o": first.file("o")}, outputs={"p": hpcq.Temp()})
    one.queue.submit(second)
    third = one.run(hpcq.Task("cat p", inputs={"p": second.file("p")}))
    assert third.outcome == second.outcome == "files"
    assert "input 'o' is an output of task 1 (exit 3), which ended as exit_code" in second.message
    assert "task 2" in third.message


def test_a_consumer_can_be_cancelled_while_it_waits(site):
    first = hpcq.Task("true", outputs={"o": hpcq.Temp()})
    site.queue.submit(first)
    second = hpcq.Task("cat o", inputs={"o": first.file("o")})
    number = site.queue.submit(second)
    assert site.queue.cancel(id=number) == 1
    assert site.queue.wait_for_id(number, 90).outcome == "cancelled"


def test_what_stayed_on_a_pilot_that_is_gone_is_made_again(site):
    killed = site.pilot(node="node1", cores=1)
    runs = site.data / "runs"
    first = hpcq.Task(f"echo ran >> {runs}; echo made > o", outputs={"o": hpcq.Temp()})
    assert site.run(first).outcome == "success"
    killed.kill()
    killed.wait()
    site.pilot(node="node2", cores=1)
    assert site.run(hpcq.Task("cat o", inputs={"o": first.file("o")})).result() == "made\n"
    assert runs.read_text() == "ran\nran\n"
    assert site.queue.empty()


def test_what_stayed_is_taken_from_the_pilot_that_has_it(site):
    site.pilot(node="node1", cores=1)
    first = hpcq.Task("head -c 3000000 /dev/urandom > o; sha1sum < o", outputs={"o": hpcq.Temp()})
    made = site.run(first).result()
    site.pilot(node="node2", cores=1)
    site.ready(2)
    meet = together(site, 2)
    readers = [hpcq.Task(f"sha1sum < o; {meet}", inputs={"o": first.file("o")}) for _ in range(2)]
    for reader in readers:
        site.queue.submit(reader)
    assert {site.queue.wait(90).result() for _ in readers} == {made}
    assert len({reader.pilot for reader in readers}) == 2
    assert site.given() == {}


def test_a_temp_that_is_lost_again_and_again_ends_by_name(site):
    """Its producer cannot make it any more: the consumer does not wait for ever."""
    flag = site.data / "flag"
    flag.touch()
    killed = site.pilot(node="node1", cores=1)
    first = hpcq.Task(f"rm {flag} && echo made > o", outputs={"o": hpcq.Temp()})
    assert site.run(first).outcome == "success"
    killed.kill()
    killed.wait()
    site.pilot(node="node2", cores=1)
    task = site.run(hpcq.Task("cat o", inputs={"o": first.file("o")}))
    assert task.outcome == "files"
    assert "input 'o'" in task.message
    assert "task 1" in task.message
    assert site.queue.empty()


# --- URLs ---


class Server(BaseHTTPRequestHandler):
    busy = 0

    def do_GET(self):
        cls = type(self)
        if self.path == "/busy" and cls.busy < 1:
            cls.busy += 1
            self.send_error(503)
        elif self.path == "/none":
            self.send_error(404)
        elif self.path == "/short":
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"short")
        else:
            self.send_response(200)
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"data")

    def log_message(self, *_arguments):
        pass


@pytest.fixture
def web(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_urls(one, web):
    urls = {"a": hpcq.URL(f"{web}/a"), "b": hpcq.URL(f"{web}/busy"), "c": hpcq.URL(f"{web}/c", cache=True)}
    assert one.run(hpcq.Task("cat a b c", inputs=urls)).result() == "datadatadata"


def own_certificate(directory):
    """A key and a certificate for 127.0.0.1 that vouches for itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (directory / "web.pem").write_bytes(made.public_bytes(Encoding.PEM))
    (directory / "web.key").write_bytes(secret)
    return directory / "web.pem", directory / "web.key"


@pytest.fixture
def secure_web(tmp_path):
    """The same over TLS, and its certificate."""
    certificate, key = own_certificate(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"https://127.0.0.1:{server.server_port}", certificate
    server.shutdown()
    thread.join()
    server.server_close()


def test_https_from_a_server_that_is_trusted(site, secure_web, monkeypatch):
    web, certificate = secure_web
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    site.pilot()
    assert site.run(hpcq.Task("cat a", inputs={"a": hpcq.URL(f"{web}/a")})).result() == "data"


def test_https_from_a_server_that_is_not_trusted(one, secure_web):
    web, _ = secure_web
    task = one.run(hpcq.Task("cat a", inputs={"a": hpcq.URL(f"{web}/a")}))
    assert task.outcome == "files"
    assert "certificate verify failed" in task.message


@pytest.mark.parametrize(("path", "why"), [("/none", "404")])
def test_a_url_that_cannot_be_had(one, web, path, why):
    task = one.run(hpcq.Task("true", inputs={"a": hpcq.URL(web + path)}))
    assert task.outcome == "files"
    assert f"input 'a' ({web}{path}) cannot be had" in task.message
    assert why in task.message
