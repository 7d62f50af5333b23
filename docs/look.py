"""Open all pages of the website in Chromium, as wide as a desk and as narrow as a phone: `python docs/look.py _site`.

Tells which pages log errors, miss pictures, or are wider than the screen, and whether the search finds what it should; fails if any does.
"""
import json
import re
import shutil
import subprocess
import tempfile
import threading
from functools import partial
from html import unescape
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from fastcore.script import call_parse

LOOK = '''<!doctype html><meta charset="utf-8"><iframe id="page"></iframe><pre id="told"></pre><script>
const pages = PAGES, frame = document.getElementById("page"), told = []
const wait = ms => new Promise(done => setTimeout(done, ms))
async function open(url, width) {
  frame.width = width; frame.height = 900
  const errors = []
  await new Promise(done => { frame.onload = done; frame.src = url })
  frame.contentWindow.onerror = message => errors.push(message)
  frame.contentDocument.querySelectorAll("img").forEach(o => o.loading = "eager")
  await wait(300)
  return errors
}
async function look() {
  for (const page of pages) for (const width of [1280, 390]) {
    const errors = await open(page, width), all = frame.contentDocument
    told.push({page, width, errors, wide: all.documentElement.scrollWidth > width,
      missing: [...all.images].filter(o => !o.naturalWidth).map(o => o.src)})
  }
  await open("search.html?q=QUERY", 1280)
  await wait(3000)
  document.getElementById("told").textContent = JSON.stringify({told,
    found: [...frame.contentDocument.querySelectorAll("#search-results li a")].map(o => o.textContent)})
}
look()
</script>'''


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


def browsed(site, pages, query, browser):
    "What the browser says of the pages: a dict for each and width, and the titles that the search finds; and what it logs"
    look = Path(site)/'_look.html'
    look.write_text(LOOK.replace('PAGES', json.dumps(pages)).replace('QUERY', query), encoding='utf-8')
    server = ThreadingHTTPServer(('localhost', 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with tempfile.TemporaryDirectory() as profile: done = subprocess.run(
            [browser, '--headless', '--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking',
            '--disable-component-update', '--enable-logging=stderr',
             f'--user-data-dir={profile}', '--virtual-time-budget=600000', '--dump-dom',
             f'http://localhost:{server.server_port}/_look.html'], capture_output=True, text=True, timeout=500)
    finally:
        server.shutdown()
        look.unlink()
    told = re.search('<pre id="told">(.+?)</pre>', done.stdout, re.S)
    if told is None: raise SystemExit(f"The browser did not come to an end: {done.stderr[-2000:]}")
    return json.loads(unescape(told[1])),[line for line in done.stderr.splitlines() if 'CONSOLE' in line]


@call_parse
def main(
    site:str, # Folder of the website
    query:str='ManifoldMixUp', # What to search for
    browser:str='chromium', # Command or path of the browser
):
    "Look at all pages"
    if not shutil.which(browser): raise SystemExit(f"--browser must be the command of a Chromium, got {browser!r}")
    pages = [p.relative_to(site).as_posix() for p in sorted(Path(site).rglob('*.html'))]
    pages = [p for p in pages if not p.startswith('_')]
    if 'index.html' not in pages: raise SystemExit(f"{site} must hold the website: python docs/build.py --out {site}")
    said,logged = browsed(site, pages, query, browser)
    faults = [f"{o['page']} at {o['width']} px: {what}" for o in said['told']
        for what in [*o['errors'], *['wider than the screen']*o['wide'], *(f'no picture {src}' for src in o['missing'])]]
    if not said['found']: faults.append(f'search: {query} is not found')
    print(f"{len(pages)} pages at two widths; {query} is found on {len(said['found'])}: {', '.join(said['found'][:8])}")
    if faults or logged: raise SystemExit('\n'.join(faults + logged))
