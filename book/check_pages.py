"""Open every page of the built book in headless Chromium and report what is wrong with it.

A developer's tool; it needs Playwright (``pip install playwright``) and a Chromium::

    python book/check_pages.py _build/html --screenshots shots

Each page is opened once from a loopback server, where it is looked at light and dark, wide and as on a
phone, and once from the file system.
Reported are console errors, requests that leave the machine, broken links, pages more than three
clicks of running text away from the front page, SIMULATED numbers without the word and real ones with
it (``check_kinds.py``), images that are missing, unlabelled, without a caption in words or wider than
their column, tables and code beyond it, text that the theme makes unreadable, pages that scroll
sideways, mathematics left unset, a search that finds nothing and a table of results that does not sort
and filter. Exit status 1 if there is anything to report.
"""

import argparse
import asyncio
import sys
import threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

from check_kinds import mismarked
from playwright.async_api import async_playwright

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
]  # fmt: skip
VIEWS = [(theme, width) for theme in ("light", "dark") for width in (1280, 390)]
LOOK = """width => {
  const found = [], folded = [...document.querySelectorAll('article details:not([open])')];
  for (const box of folded) box.open = true;
  const scrolls = e => {
    for (; e && e.tagName !== 'ARTICLE'; e = e.parentElement)
      if (['auto', 'scroll'].includes(getComputedStyle(e).overflowX)) return true;
    return false;
  };
  for (const img of document.querySelectorAll('article img')) {
    const name = img.getAttribute('src').split('/').pop();
    const alt = (img.getAttribute('alt') || '').trim();
    if (!alt || /\\.(svg|png)$/.test(alt)) found.push('image without alt text: ' + name);
    if (!img.naturalWidth) found.push('broken image: ' + name);
    const right = e => e.getBoundingClientRect().right;
    if (right(img) > right(img.closest('article')) + 1 && !scrolls(img))
      found.push('image wider than its column: ' + name);
  }
  for (const box of document.querySelectorAll('article :is(table, pre, svg, figure)')) {
    const right = box.getBoundingClientRect().right;
    if (right > box.closest('article').getBoundingClientRect().right + 1 && !scrolls(box))
      found.push(box.tagName.toLowerCase() + ' beyond its column: ' + box.textContent.trim().slice(0, 40));
  }
  for (const img of document.querySelectorAll('article div.cell_output img'))
    if (!img.closest('figure')?.querySelector('figcaption')?.textContent.trim())
      found.push('figure without a caption: ' + img.getAttribute('alt'));
  const paint = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const known = new Map();
  const levels = color => {
    if (known.has(color)) return known.get(color);
    paint.clearRect(0, 0, 1, 1);
    paint.fillStyle = color;
    paint.fillRect(0, 0, 1, 1);
    known.set(color, [...paint.getImageData(0, 0, 1, 1).data]);
    return known.get(color);
  };
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const dim = new Set();
  for (const e of document.querySelectorAll('article :is(p, li, td, th, h1, h2, h3, figcaption, pre, code, dt)')) {
    if (!e.offsetParent || ![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
    let ground = e;
    while (ground && levels(getComputedStyle(ground).backgroundColor)[3] < 200) ground = ground.parentElement;
    const back = light(ground ? levels(getComputedStyle(ground).backgroundColor) : [255, 255, 255]);
    const front = light(levels(getComputedStyle(e).color));
    const contrast = (Math.max(back, front) + 0.05) / (Math.min(back, front) + 0.05);
    if (contrast < 4.5) dim.add(e.tagName.toLowerCase() + ' of contrast ' + contrast.toFixed(1));
  }
  for (const text of dim) found.push('hard to read: ' + text);
  const table = document.querySelector('table.all-results');
  if (table) {
    const rows = () => [...table.tBodies[0].rows].filter(row => !row.hidden);
    const column = i => rows().map(row => parseFloat(row.cells[i].textContent.replace('\u2212', '-')));
    const all = rows().length, field = document.querySelector('.filters input');
    const type = word => { field.value = word; field.dispatchEvent(new Event('input')); };
    type(table.tBodies[0].rows[0].cells[2].textContent.trim());
    if (!rows().length || rows().length === all) found.push('the table of results does not filter');
    type('');
    const before = rows(), head = table.tHead.rows[0].cells[4].querySelector('button');
    head.click();
    if (!column(4).every((v, i, c) => !i || c[i - 1] <= v)) found.push('the table of results does not sort');
    table.tHead.rows[0].cells[4].removeAttribute('aria-sort');
    table.tBodies[0].append(...before);
  }
  const over = document.documentElement.scrollWidth - width;  // a phone widens its window to what does not fit
  if (over > 0) found.push('page scrolls sideways by ' + over + ' px');
  for (const math of document.querySelectorAll('article .math'))
    if (!math.querySelector('mjx-container')) found.push('not set: ' + math.textContent);
  if (document.querySelector('mjx-merror, [data-mjx-error]')) found.push('error in mathematics');
  const text = document.querySelector('article')?.textContent || '';
  if (/\\{(result|verdict|doc|term|cite|numref)\\}`/.test(text)) found.push('a role was left as text');
  for (const box of folded) box.open = false;
  return found;
}"""


class Page(HTMLParser):
    """Links and anchors of one page; `text` has the links of its running text."""

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors, self.text, self.inside = set(), set(), set(), 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors |= {attributes[key] for key in ("id", "name") if attributes.get(key)}
        self.links |= {attributes[key] for key in ("href", "src") if attributes.get(key)}
        self.inside += tag == "article"
        if self.inside and tag == "a" and attributes.get("href"):
            self.text.add(attributes["href"])

    def handle_endtag(self, tag):
        self.inside -= tag == "article"


def broken_links(folder, pages):
    """Report each local link without a target, and each anchor without an element."""
    parsed = {path: Page(path) for path in pages}
    for path, page in parsed.items():
        for link in sorted(page.links):
            url, anchor = urldefrag(link)
            if urlsplit(url).scheme or url.startswith("//"):
                continue
            target = (path.parent / unquote(urlsplit(url).path)).resolve() if url else path
            if not target.is_file():
                yield f"{path.relative_to(folder)}: broken link {link}", "every view"
            elif anchor and target in parsed and unquote(anchor) not in parsed[target].anchors:
                yield f"{path.relative_to(folder)}: no such anchor {link}", "every view"


def far_away(folder, pages, clicks=3):
    """Report each page that needs more clicks from the front page than `clicks`, by links in running text."""
    front = folder / "book" / "index.html"
    reached, ring = {front}, {front}
    for _ in range(clicks):
        links = {(page, urlsplit(urldefrag(link).url)) for page in ring for link in Page(page).text}
        targets = {
            (page.parent / unquote(url.path)).resolve()
            for page, url in links
            if url.path and not url.scheme
        }
        ring = (targets & set(pages)) - reached
        reached |= ring
    for path in sorted(set(pages) - reached):
        if (
            path.name not in ("search.html", "genindex.html", "py-modindex.html")
            and path.parent != folder
        ):
            yield (
                f"{path.relative_to(folder)}: more than {clicks} clicks from the front page",
                "every view",
            )


def note_outside(found, request):
    """Note a request that leaves this machine."""
    if urlsplit(request.url).hostname not in (None, "127.0.0.1"):
        found.append(f"asks for {request.url}")


def note_error(found, message):
    """Note an error on the console, but not that the redirecting page has no icon."""
    if message.type == "error" and not message.location["url"].endswith("favicon.ico"):
        found.append(message.text)


async def open_page(tab, base, name, views, shoot):
    """Open a page once, look at it in every view and yield what is wrong with the view."""
    redirects = name == "index.html"
    await tab.emulate_media(color_scheme=views[0][0])
    await tab.set_viewport_size({"width": views[0][1], "height": 900})
    await tab.goto(f"{base}/{name}", wait_until="networkidle" if redirects else "load")
    await tab.add_style_tag(
        content="*, ::before, ::after { transition: none !important; animation: none !important }"
    )
    await tab.evaluate("window.MathJax?.startup?.promise.then(() => true)")
    for theme, width in views:
        view = f"{base[:4]}-{theme}-{width}"
        await tab.emulate_media(color_scheme=theme)
        await tab.set_viewport_size({"width": width, "height": 900})
        await tab.evaluate(
            "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done())))"
        )
        if await tab.evaluate("document.documentElement.dataset.theme") not in (theme, None):
            yield f"{name}: does not turn {theme}", view
        for text in await tab.evaluate(LOOK, width):
            yield f"{name}: {text}", view
        if shoot:
            shot = name.replace("/", "-").removesuffix("html") + view
            await tab.screenshot(path=shoot / f"{shot}.png", full_page=True)


async def search(tab, base):
    """Yield what is wrong with the search for a word that the book has."""
    await tab.goto(f"{base}/search.html?q=wavelet")
    try:
        await tab.wait_for_selector("#search-results li a", timeout=20000)
    except Exception:
        yield "search: 'wavelet' is not found"
    if base.startswith("http"):  # summaries are fetched after the titles
        await tab.wait_for_selector("#search-results li p", timeout=20000)


async def open_pages(folder, names, bases, options):
    """Open every page at both addresses in several tabs of one browser and return the reports with their views."""
    reports, queue = [], [(base, name) for base in bases for name in [*names, None]]
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=options.chromium, args=FLAGS)

        async def work():
            context = await browser.new_context()
            tab, found = await context.new_page(), []
            tab.on("console", partial(note_error, found))
            tab.on("pageerror", lambda error: found.append(str(error)))
            tab.on("request", partial(note_outside, found))
            while queue:
                base, name = queue.pop(0)
                served = base.startswith("http")
                if name is None:
                    looked = search(tab, base)
                    reports.extend([(text, f"{base[:4]}-light-1280") async for text in looked])
                else:
                    looked = open_page(
                        tab, base, name, VIEWS if served else VIEWS[:1], options.screenshots
                    )
                    reports.extend([report async for report in looked])
                reports.extend((f"{name or 'search'}: {text}", base[:4]) for text in found)
                found.clear()
            await context.close()

        await asyncio.gather(*(work() for _ in range(options.tabs)))
        await browser.close()
    return reports


def main():
    """Check the book and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("_build/html"))
    parser.add_argument("--screenshots", type=Path, help="folder for one picture per page and view")
    parser.add_argument("--pages", default="", help="only those whose path has this in it")
    parser.add_argument("--tabs", type=int, default=2, help="pages looked at side by side")
    parser.add_argument("--chromium", default="/usr/bin/chromium", help="its executable")
    options = parser.parse_args()
    folder = options.folder.resolve()
    pages = sorted(p for p in folder.rglob("*.html") if "_static" not in p.parts)
    if options.screenshots:
        options.screenshots.mkdir(parents=True, exist_ok=True)
    handler = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    ThreadingHTTPServer.handle_error = lambda *_: None  # a page that is left while it loads
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    reports = [*broken_links(folder, pages), *far_away(folder, pages)]
    reports += mismarked(folder, pages, Path(__file__).resolve().parents[1])
    names = [
        name
        for name in (path.relative_to(folder).as_posix() for path in pages)
        if options.pages in name
    ]
    bases = (f"http://127.0.0.1:{server.server_port}", folder.as_uri())
    reports += asyncio.run(open_pages(folder, names, bases, options))
    server.shutdown()
    views = {}
    for report, view in reports:
        views.setdefault(report, []).append(view)
    for report, where in views.items():
        print(f"{report} [{where[0]}{f' and {len(where) - 1} more' if len(where) > 1 else ''}]")
    print(f"{len(names)} pages, {len(views)} reports")
    return int(bool(views))


if __name__ == "__main__":
    sys.exit(main())
