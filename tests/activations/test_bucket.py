"""A store in a bucket: TensorStore's driver for Google Cloud Storage, speaking to a bucket of this test over HTTP."""

import http.server
import json
import subprocess
import sys
import textwrap
import threading
import urllib.parse

import pytest

BUCKET = "/storage/v1/b/a-bucket/o"


class Bucket(http.server.BaseHTTPRequestHandler):
    """As much of the service as a store needs: objects with generations, conditional writing, ranges, lists."""

    protocol_version = "HTTP/1.1"
    objects: dict[str, tuple[int, bytes]]
    log: list[str]

    def asked(self):
        url = urllib.parse.urlsplit(self.path)
        name = urllib.parse.unquote(url.path.removeprefix(BUCKET).lstrip("/"))
        query = {key: values[0] for key, values in urllib.parse.parse_qs(url.query).items()}
        self.log.append(f"{self.command} {query.get('name', name)}")
        return name, query

    def answer(self, status, content=b"", **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        name, query = self.asked()
        if not name:
            prefix, start = query.get("prefix", ""), query.get("startOffset", "")
            end = query.get("endOffset", "\U0010ffff")
            names = [one for one in sorted(self.objects) if one.startswith(prefix) and start <= one < end]
            return self.answer(200, {"items": [{"name": one} for one in names]})
        if name not in self.objects:
            return self.answer(404)
        generation, content = self.objects[name]
        headers = {"x_goog_generation": str(generation)}
        if "Range" not in self.headers:
            return self.answer(200, content, **headers)
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        start, stop = (
            (int(first), int(last or len(content) - 1) + 1) if first else (len(content) - int(last), len(content))
        )
        headers["Content_Range"] = f"bytes {start}-{min(stop, len(content)) - 1}/{len(content)}"
        return self.answer(206, content[start:stop], **headers)

    def do_POST(self):
        _, query = self.asked()
        content = self.rfile.read(int(self.headers["Content-Length"]))
        generation = self.objects.get(query["name"], (0, b""))[0]
        if int(query.get("ifGenerationMatch", generation)) != generation:
            return self.answer(412)
        self.objects[query["name"]] = (len(self.log), content)
        return self.answer(200, {"name": query["name"], "generation": str(len(self.log))})

    def do_DELETE(self):
        name, _ = self.asked()
        self.objects.pop(name, None)
        return self.answer(204)

    def log_message(self, *_):
        return


@pytest.fixture
def bucket():
    handler = type("OneBucket", (Bucket,), {"objects": {}, "log": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", handler
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_store_in_a_bucket_is_written_by_two_processes_read_shuffled_and_checked(bucket):
    address, service = bucket
    code = """
        import sys, warnings
        import numpy as np
        from interp_jax.activations.store import ActivationStore

        url, what = "gs://a-bucket/some/store", sys.argv[1]
        rows = np.random.default_rng(0).normal(size=(4, 500, 300)).astype(np.float32)
        if what in ("0", "1"):
            store = ActivationStore(url, d_in=300, provenance={"model": "toy"}, part=(int(what), 2))
            store.extend(rows[2 * int(what) : 2 * int(what) + 2], shard_rows=500)
            store.finish()
        if what == "0":
            store = ActivationStore.open(url)
            assert store.is_finished and store.n_rows == 2000
            np.testing.assert_array_equal(store.rows(np.arange(2000)), rows.reshape(2000, 300))
            np.testing.assert_array_equal(store.rows(np.array([1999, 3])), rows.reshape(2000, 300)[[1999, 3]])
            batch = store.shuffled(100)
            epoch = np.concatenate([batch(step) for step in range(20)])
            np.testing.assert_array_equal(np.sort(epoch, axis=0), np.sort(rows.reshape(2000, 300), axis=0))
        if what == "damaged":
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                store = ActivationStore.open(url)
            assert "gs://a-bucket/some/store/part_00001/shard_00001 is damaged" in str(caught[0].message), caught
            assert store.n_rows == 1500
    """
    environment = {"TENSORSTORE_GCS_HTTP_URL": address, "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none", "PATH": ""}

    def run(what):
        subprocess.run([sys.executable, "-c", textwrap.dedent(code), what], check=True, timeout=60, env=environment)

    run("1")
    run("0")
    names = [f"some/store/part_0000{part}/shard_0000{number}/c/0/0" for part in (0, 1) for number in (0, 1)]
    assert [name for name in sorted(service.objects) if "/c/" in name] == names
    generation, content = service.objects[names[-1]]
    service.objects[names[-1]] = (generation, content[:1000] + b"x" + content[1001:])
    run("damaged")
