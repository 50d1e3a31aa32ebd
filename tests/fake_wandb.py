"""A stand-in for the Weights & Biases server: enough HTTP for a client to make, feed, resume and end runs."""

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeWandb:
    """Answers at `url` in its `with` block. `created`: run ids as they come; `rows[run id]`: its history."""

    def __init__(self):
        self.created, self.rows, self.finished = [], {}, set()
        fake, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                with lock:
                    answer = json.dumps(fake.answer(self.path, body)).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_PUT = do_GET = do_POST

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads, self.http.block_on_close = True, False
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()

    def answer(self, path, body):
        if path.endswith("/file_stream"):
            return self.stream(path.split("/")[-2], json.loads(body))
        if not path.endswith("/graphql"):
            return {}  # an uploaded file
        ask = json.loads(body)
        operation, given = ask["query"].split("(")[0].split()[1], ask.get("variables") or {}
        run = given.get("name")
        project = {"id": "p", "name": given.get("project"), "entity": {"id": "e", "name": "me"}}
        rows = [json.dumps(row) for _, row in sorted(self.rows.get(run, {}).items())]
        bucket = {"id": run, "name": run, "displayName": run, "config": "{}", "historyLineCount": len(rows)}
        if operation == "UpsertBucket":
            self.created.append(run)
            bucket["project"] = project
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": run not in self.rows}}}
        if operation == "RunResumeStatus":
            bucket |= {
                "historyTail": json.dumps(rows[-1:]),
                "summaryMetrics": "{}",
                "wandbConfig": '{"t": 1}',
            }
            bucket |= {"eventsTail": "[]", "eventsLineCount": 0, "logLineCount": 0}
            return {"data": {"model": project | {"bucket": bucket if run in self.created else None}}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in given["files"]]
            return {"data": {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}}
        viewer = {"id": "u", "entity": "me", "username": "me"}
        return {"data": {"viewer": viewer, "serverInfo": {"features": []}}}

    def stream(self, run, sent):
        part = (sent.get("files") or {}).get("wandb-history.jsonl")
        if part:
            lines = enumerate(map(json.loads, part["content"]), part["offset"])
            self.rows.setdefault(run, {}).update(lines)
        if sent.get("complete"):
            self.finished.add(run)
        return {}
