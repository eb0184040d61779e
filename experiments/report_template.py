"""The page of a report: one template and its styles, as text.

An app bundle carries Python files but no HTML, so both are Python strings. The page loads nothing
and runs no script; its content policy says so to the browser as well.
"""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fcfcfa; --ink: #1c1c1e; --soft: #66666e; --line: #e2e2de; --tint: #f3f3ef;
  --heat: #e0a03c; --accent: #0a6ca6; --warn: #a34a00; --warn-tint: #fdf1e4;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #161719; --ink: #e9e9e6; --soft: #9d9da5; --line: #303236; --tint: #1e2023;
    --heat: #8a5a10; --accent: #6cb8ea; --warn: #f0a860; --warn-tint: #2b2218;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 3rem 1.25rem 5rem; max-width: 68rem;
  background: var(--paper); color: var(--ink);
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: break-word;
}
h1 { margin: 0 0 .25rem; font-size: 2rem; line-height: 1.2; font-weight: 650;
     letter-spacing: -.02em; }
h2 { margin: 3.5rem 0 .75rem; font-size: 1.25rem; line-height: 1.3; font-weight: 650;
     letter-spacing: -.01em; }
h3 { margin: 2rem 0 .5rem; font-size: 1rem; font-weight: 650; }
p, li, dd { max-width: 44rem; }
p { margin: .5rem 0; }
.soft, small, figcaption { color: var(--soft); }
.soft { font-size: .9rem; }
.notice { margin: 1.25rem 0; padding: .6rem .9rem; max-width: 44rem; border-radius: .5rem;
          background: var(--tint); font-size: .92rem; }
.warn { background: var(--warn-tint); color: var(--warn); }
.notice strong { font-weight: 650; }
ol.said { margin: 0; padding: 0; list-style: none; }
ol.said li { padding: .55rem 0 .55rem 1.1rem; border-left: 2px solid var(--line);
             margin-bottom: .3rem; }
ol.said li.lead { border-color: var(--accent); }

.strip { display: grid; grid-template-columns: 11rem 1fr; gap: 0 1.25rem; align-items: center;
         padding: .5rem 0; border-top: 1px solid var(--line); }
.strip:first-child { border-top: 0; }
.strip .name { font-size: .88rem; line-height: 1.35; }
.strip .name b { display: block; font-weight: 600; }
.strip .name span { color: var(--soft); }
.strip .row + .note { grid-column: 2; }
.row { display: grid; grid-template-columns: repeat(8, minmax(0, 1fr)); gap: .4rem;
       max-width: 46rem; }
.row figure { margin: 0; text-align: center; }
.row img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain;
           image-rendering: pixelated; border-radius: .2rem; background: #000; }
.row figcaption { font-size: .72rem; line-height: 1.5; margin-top: .15rem; }
.originals .name b { color: var(--accent); }

.charts { display: flex; flex-wrap: wrap; gap: 1rem 2rem; }
.charts svg { flex: 1 1 20rem; width: 100%; max-width: 31rem; height: auto; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; margin: .25rem 0 0; padding: 0;
          list-style: none; font-size: .88rem; }
.legend li { max-width: none; }

table { border-collapse: collapse; width: 100%; font-size: .86rem; line-height: 1.4; }
.wide { overflow-x: auto; }
th, td { padding: .5rem .75rem .5rem 0; text-align: left; vertical-align: top; }
thead th { font-weight: 600; color: var(--soft); border-bottom: 1px solid var(--line);
           vertical-align: bottom; }
tbody tr { border-bottom: 1px solid var(--line); }
tbody tr.doubted { border-bottom: 0; }
tbody tr.doubt td { padding-top: 0; color: var(--warn); }
tbody th { font-weight: 600; }
td small, th small { display: block; font-weight: 400; font-size: .78rem; }
table.scores td small { white-space: nowrap; }
table.scores th small { max-width: 13rem; }
table.heat td { padding: .5rem .6rem; background:
  color-mix(in srgb, var(--heat) var(--tint, 0%), transparent); }
tr.plain th, tr.plain td { color: var(--soft); }
.yes { color: var(--soft); } .no { color: var(--warn); font-weight: 600; }

details { margin: .75rem 0; }
summary { cursor: pointer; color: var(--accent); font-size: .92rem; }
dl { margin: .5rem 0; } dt { font-weight: 600; margin-top: .9rem; } dd { margin: .1rem 0 0; }
code { font: .88em ui-monospace, "SF Mono", Menlo, Consolas, monospace; }

@media (max-width: 46rem) {
  body { padding: 1.5rem 1rem 3rem; }
  h1 { font-size: 1.6rem; } h2 { margin-top: 2.5rem; }
  .strip { grid-template-columns: 1fr; gap: .4rem; padding: .8rem 0; }
  .strip .row + .note { grid-column: 1; }
  .row { grid-template-columns: repeat(4, minmax(0, 1fr)); }
  table.scores thead { display: none; }
  table.scores, table.scores tbody, table.scores tr, table.scores th, table.scores td {
    display: block; }
  table.scores tr { padding: .7rem 0; }
  table.scores tr.doubt { padding-top: 0; }
  table.scores th, table.scores td { padding: .15rem 0; }
  table.scores td[data-label] { display: grid; grid-template-columns: 9rem 1fr; }
  table.scores td[data-label]::before { content: attr(data-label); color: var(--soft); }
}
@media print { body { max-width: none; padding: 0; } details { display: none; } }
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="referrer" content="no-referrer">
<title>{{ title }}: what leaked</title>
<style>{{ style }}</style>
</head>
<body>
<header>
<h1>{{ title }}</h1>
<p class="soft">{{ ran }}</p>
{% if demo %}<p class="notice warn"><strong>Demo.</strong> {{ demo }}</p>{% endif %}
{% for warning in warnings %}<p class="notice warn">{{ warning }}</p>{% endfor %}
<p class="notice"><strong>For the owner of the private data.</strong> This file shows private
samples beside what was recovered from them. It is as private as the data itself.</p>
</header>

<main>
<section>
<h2>What the numbers say</h2>
<p class="soft">Generated from the cards. A difference is claimed only if it exceeds two standard
errors.</p>
<ol class="said">{% for sentence in sentences %}
<li{% if loop.first %} class="lead"{% endif %}>{{ sentence }}</li>{% endfor %}
</ol>
</section>

{% if matrices %}<section>
<h2>Every attack under every defence</h2>
<p class="soft">The darker a field, the nearer the attack came to recovering everything, counted
from the best guess that needed no message, which stands in brackets. Of several seeds a field has
the mean, and below it the lowest and the highest. The last line is the task's test accuracy: what
the defence cost.</p>
{% for matrix in matrices %}
<h3>{{ matrix.title }}</h3>
{% if matrix.note %}<p class="soft">{{ matrix.note }}</p>{% endif %}
<div class="wide"><table class="heat">
<thead><tr><th>attack</th>{% for name in matrix.defenses %}<th>{{ name }}</th>{% endfor %}</tr>
</thead>
<tbody>{% for row in matrix.rows %}
<tr><th>{{ row.attack }}<small>{{ row.metric }}</small></th>
{% for field in row.fields %}<td style="--tint: {{ field.tint }}%">{{ field.value }}
{% if field.range %}<small>{{ field.range }}</small>{% endif %}
{% if field.base %}<small>{{ field.base }}</small>{% endif %}</td>
{% endfor %}</tr>{% endfor %}
<tr class="plain"><th>task, test accuracy</th>
{% for value in matrix.utility %}<td>{{ value }}</td>{% endfor %}</tr></tbody>
</table></div>
{% endfor %}</section>{% endif %}

{% if blocks %}<section>
<h2>Originals beside reconstructions</h2>
<p class="soft">The first private samples of each cell, not chosen ones; below each reconstruction
its |Pearson| with the original, where that is known. Reconstructions are shown over their own full
range of
intensities, and nothing else is done to them.</p>
{% for block in blocks %}
{% if block.title %}<h3>{{ block.title }}</h3>{% endif %}
<div>
{% if block.originals %}<div class="strip originals">
<div class="name"><b>originals</b><span>what a node holds</span></div>
<div class="row">{% for picture in block.originals %}
<figure><img src="{{ picture.source }}" alt="private sample {{ loop.index }}">
<figcaption>{{ picture.caption }}</figcaption></figure>{% endfor %}
</div></div>{% endif %}
{% for strip in block.strips %}<div class="strip">
<div class="name"><b>{{ strip.attack }}</b><span>{{ strip.setting }}</span></div>
{% if strip.pictures %}<div class="row">{% for picture in strip.pictures %}
<figure><img src="{{ picture.source }}" alt="reconstruction {{ loop.index }} by {{ strip.attack }}">
<figcaption>{{ picture.caption }}</figcaption></figure>{% endfor %}
</div>{% endif %}
{% if strip.note %}<div class="note soft">{{ strip.note }}</div>{% endif %}
</div>
{% endfor %}</div>
{% endfor %}</section>{% endif %}

{% if charts %}<section>
<h2>Leakage against utility</h2>
<p class="soft">A cell in the upper right leaks much and learns much; a defence that is worth its
price moves it down without moving it left. Bars are two standard errors; hollow marks need no
attack.</p>
<div class="charts">{% for chart in charts %}{{ chart }}{% endfor %}</div>
{% for line in legend %}<ul class="legend">{% for entry in line %}
<li><span{% if entry.color %} style="color: {{ entry.color }}"{% endif %}>{{ entry.glyph }}</span>
{{ entry.name }}</li>{% endfor %}
</ul>{% endfor %}
</section>{% endif %}

{% if tables %}<section>
<h2>All scores</h2>
<p class="soft">Below each score its error (of rates the exact 95% interval, of several seeds
widened to two standard errors between them where those reach further; else two standard errors)
and the best guess that needed no message. The cost is the attack's time, then the
training's, and the bytes from and to the nodes.</p>
{% for table in tables %}
<h3>{{ table.title }}</h3>
<div class="wide"><table class="scores">
<thead><tr><th>attack</th>{% for metric in table.metrics %}<th>{{ metric }}</th>
{% endfor %}<th>control</th><th>utility</th><th>cost</th>
{% if table.reported %}<th>published</th>{% endif %}</tr></thead>
<tbody>{% for row in table.rows %}
<tr class="{{ row.kind }}"><th>{{ row.attack }}<small>{{ row.setting }}</small></th>
{% for cell in row.metrics %}<td data-label="{{ cell.label }}"><span>{{ cell.value }}
{% for note in cell.notes %}<small>{{ note }}</small>{% endfor %}</span></td>
{% endfor %}<td data-label="control" class="{{ row.control.kind }}">{{ row.control.text }}</td>
<td data-label="utility"><span>{{ row.utility.value }}
{% if row.utility.name %}<small>{{ row.utility.name }}</small>{% endif %}</span></td>
<td data-label="cost"><span>{{ row.cost.time }}
{% for note in row.cost.notes %}<small>{{ note }}</small>{% endfor %}</span></td>
{% if table.reported %}<td data-label="published">{{ row.reported }}</td>{% endif %}
</tr>
{% if row.doubts %}<tr class="doubt"><td colspan="9">{{ row.doubts }}</td></tr>{% endif %}
{% endfor %}</tbody>
</table></div>
<details><summary>Every metric and every baseline</summary>
<div class="wide"><table>
<thead><tr><th>who</th>{% for metric in table.all_metrics %}<th>{{ metric }}</th>
{% endfor %}<th>peak memory</th></tr></thead>
<tbody>{% for row in table.everything %}
<tr class="{{ row.kind }}"><th>{{ row.name }}<small>{{ row.setting }}</small></th>
{% for value in row.metrics %}<td>{{ value }}</td>{% endfor %}
<td>{{ row.memory }}</td></tr>{% endfor %}
</tbody></table></div></details>
{% endfor %}</section>{% endif %}

{% if stolen %}<section>
<h2>Stolen models</h2>
<p class="soft">A stolen bottom under the server's own top, on test images, beside a bottom that
nothing was fitted to and the victim's own.</p>
<div class="wide"><table><thead><tr><th>attack</th><th>accuracy</th><th>untrained bottom</th>
<th>victim</th><th>agrees with victim</th><th>untrained bottom</th></tr></thead>
<tbody>{% for row in stolen %}<tr><th>{{ row.attack }}<small>{{ row.setting }}</small></th>
{% for value in row.metrics %}<td>{{ value }}</td>{% endfor %}</tr>{% endfor %}
</tbody></table></div>
</section>{% endif %}

{% if detectors %}<section>
<h2>Detectors at the nodes</h2>
<p class="soft">How many runs raised an alarm, with the exact 95% interval; at which gradient the
alarm came, and the median of what the adversary's decoder read by then.</p>
<div class="wide"><table>
<thead><tr>{% for name in detector_columns %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in detectors %}<tr>
{% for value in row %}<td>{{ value }}</td>{% endfor %}</tr>{% endfor %}
</tbody></table></div>
</section>{% endif %}

{% if threats %}<section>
<h2>Threat models</h2>
<dl>{% for threat in threats %}<dt>{{ threat.attacks }}</dt><dd>{{ threat.words }}</dd>{% endfor %}
</dl>
</section>{% endif %}

{% if unfit %}<section>
<h2>What has no scores</h2>
<dl>{% for cell in unfit %}<dt>{{ cell.name }}</dt><dd>{{ cell.why }}</dd>{% endfor %}</dl>
</section>{% endif %}

<section>
<h2>How to read the scores</h2>
<dl>{% for name, words in glossary %}<dt>{{ name }}</dt><dd>{{ words }}</dd>{% endfor %}</dl>
</section>
</main>
<footer><p class="soft">{{ made }}</p></footer>
</body>
</html>
"""
