"""The Jinja templates of reports. A Python file, since Flower ships no HTML with an app."""

_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{% if status is defined and status.status == "running" %}<meta http-equiv="refresh" content="30">
{% endif %}<title>{{ name }} – FedDM</title>
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --bg: #f6f7f9; --card: #fff; --ink: #1b1f27; --soft: #667085; --line: #e3e6ec;
  --s0: #2563eb; --s1: #d9480f; --s2: #0f766e; --s3: #9333ea; --s4: #b45309; --s5: #be185d; --s6: #4d7c0f; --s7: #475569; --good: #15803d; --bad: #b91c1c; }
@media (prefers-color-scheme: dark) { :root { --bg: #101318; --card: #181d25; --ink: #e7eaf0; --soft: #98a2b3;
  --line: #2a313d; --s0: #7aa7ff; --s1: #ff9b66; --s2: #5eead4; --s3: #d8b4fe; --s4: #fcd34d; --s5: #f9a8d4; --s6: #bef264; --s7: #cbd5e1; --good: #4ade80; --bad: #f87171; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin: 2rem 0 .75rem; }
p { margin: .4rem 0; } .soft { color: var(--soft); font-size: .9rem; }
.badge { color: #fff; border-radius: 1rem; padding: .1rem .7rem; font-size: .85rem; background: #667085; }
.badge.completed { background: #15803d; } .badge.failed { background: #b91c1c; }
.reason { border-left: 4px solid var(--bad); padding: .5rem .9rem; background: var(--card); white-space: pre-wrap; }
.reason.completed { border-color: var(--soft); }
.row { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); }
.tiles { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); margin-top: 1.2rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .7rem; padding: 1rem; }
.card h3 { margin: 0 0 .5rem; font-size: .95rem; font-weight: 600; }
.tile b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
svg { width: 100%; height: auto; display: block; } .axis { stroke: var(--line); }
.tick { fill: var(--soft); font-size: 16px; } .legend { font-size: .85rem; margin: .3rem 0 0; }
.legend { overflow-wrap: anywhere; } .legend .label { display: inline-block; margin-right: .8rem; } .line { fill: none; stroke-width: 2; }
.line.s0 { stroke: var(--s0); } .dot.s0 { fill: var(--s0); } .label.s0 { color: var(--s0); }
.line.s1 { stroke: var(--s1); } .dot.s1 { fill: var(--s1); } .label.s1 { color: var(--s1); }
.line.s2 { stroke: var(--s2); } .dot.s2 { fill: var(--s2); } .label.s2 { color: var(--s2); }
.line.s3 { stroke: var(--s3); } .dot.s3 { fill: var(--s3); } .label.s3 { color: var(--s3); }
.line.s4 { stroke: var(--s4); } .dot.s4 { fill: var(--s4); } .label.s4 { color: var(--s4); }
.line.s5 { stroke: var(--s5); } .dot.s5 { fill: var(--s5); } .label.s5 { color: var(--s5); }
.line.s6 { stroke: var(--s6); } .dot.s6 { fill: var(--s6); } .label.s6 { color: var(--s6); }
.line.s7 { stroke: var(--s7); } .dot.s7 { fill: var(--s7); } .label.s7 { color: var(--s7); }
figure { margin: 0; } figure img { width: 100%; max-width: 520px; border-radius: .4rem; display: block; }
input[type=range] { width: 100%; max-width: 520px; accent-color: var(--s0); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .9rem; }
td, th { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.bar { display: flex; height: 1rem; min-width: 200px; border-radius: .25rem; overflow: hidden; }
code, pre { font: .85rem/1.5 ui-monospace, monospace; } pre { overflow-x: auto; margin: 0; white-space: pre-wrap; }
summary { cursor: pointer; font-weight: 600; }
</style>
</head>
"""

PAGE = (
    _HEAD
    + """<body>
<main>
<h1>{{ name }} <span class="badge {{ status.status }}">{{ status.status }}</span></h1>
<p class="soft">{{ config.strategy }} · {{ config["data.name"] }} at {{ config["data.image-size"] }}×{{ config["data.image-size"] }}
{% if status.simulated is not false %} · {{ config["data.partition"] }}{% endif %} · uplink {{ config["codec.uplink"] }}, downlink {{ config["codec.downlink"] }}
{% if config["privacy.secure-aggregation"] %} · secure aggregation{% endif %} · seed {{ config.seed }}</p>
{% if status.status == "running" %}<p class="soft">This page is written anew while the run goes on, and reloads itself every half minute.</p>{% endif %}
{% if status.reason %}<p class="reason {{ status.status }}">{{ status.reason }}</p>{% endif %}
<section class="tiles">
{% for value, label, note in tiles %}
<div class="card tile"><b>{{ value }}</b>{{ label }}<div class="soft">{{ note }}</div></div>
{% endfor %}
</section>
{% if grids %}
<h2>Samples</h2>
<div class="row">
<figure class="card"><h3>Moving average of the weights (shipped)</h3>
<p><label>Round <output id="round">{{ grids[-1].round }}</output>{% if grids|length > 1 %}<br>
<input id="slider" type="range" min="0" max="{{ grids|length - 1 }}" value="{{ grids|length - 1 }}" aria-label="round of the samples">{% endif %}</label></p>
<img id="ema" alt="samples of the averaged weights" src="{{ grids[-1].ema }}"></figure>
{% if grids[-1].raw %}<figure class="card"><h3>Raw weights</h3><p>Round {{ grids[-1].round }}{% if grids|length > 1 %}<br>&nbsp;{% endif %}</p>
<img alt="samples of the raw weights" src="{{ grids[-1].raw }}"></figure>{% endif %}
</div>
{% endif %}
{% if charts %}
<h2>Curves</h2>
<div class="row">{% for title, chart in charts %}<div class="card"><h3>{{ title }}</h3>{{ chart }}</div>{% endfor %}</div>
<p class="soft">Held-out loss: denoising error on images kept from training, fixed noise, of the global weights after the round;
 bytes are the coded payloads, measured. Lost by coding: norm of what the uplink lost over that of what was to be sent.
 {% if evaluated %}FID, KID and coverage: {{ evaluated["keys"]["eval.samples"] }} samples of the averaged weights against the {{ "{:,}".format(evaluated.images) }} images of the nodes,
 which stayed there; features of {{ evaluated.features }}. {% if evaluated["keys"]["eval.samples"] < 10000 %}FID of so few samples depends on their number. {% endif %}{% endif %}
 Drift: spread of the nodes' updates over the norm of their mean. Contraction: this round's step over the last one's; below 1 the steps shrink.
 These are gauges, not proofs: the paper shows convergence for a contraction with a Lipschitz denoiser.</p>
{% endif %}
{% if evaluated and evaluated.coverage %}
<h2>Classes among the samples</h2>
<div class="card scroll"><table><tr><th>class</th><th class="n">share of the samples over share of the real images</th></tr>
{% for name, ratio in evaluated.coverage.items() %}<tr><td>{{ name }}</td><td class="n">{{ "%.2f"|format(ratio) }}</td></tr>
{% endfor %}</table>
<p class="soft">A sample counts for the class whose mean feature is nearest, which is not always its own: compare runs; 1 for each class is not what a perfect model gets.</p></div>
{% endif %}
{% if final.sites %}
{% set judged = final.sites.values()|selectattr("images", "defined")|list %}
{% set near = judged|selectattr("looked_at")|list %}
<h2>Sites</h2>
<div class="card scroll"><table><tr><th>node</th><th class="n">held-out loss</th>{% if judged %}<th class="n">right by samples alone</th><th class="n">right by its own images</th>{% endif %}{% if near %}<th class="n">images with a sample near</th>{% endif %}</tr>
{% for name, site in final.sites.items() %}<tr><td>{{ name }}</td><td class="n">{{ "%.4f"|format(site.eval_loss) }}</td>
{% if judged %}<td class="n">{{ "%.1f %%"|format(100 * site.by_samples / site.images) if site.images else "–" }}</td><td class="n">{{ "%.1f %%"|format(100 * site.by_own / site.images) if site.images else "–" }}</td>{% endif %}
{% if near %}<td class="n">{{ "%.0f %%"|format(100 * site.covered / site.looked_at) if site.looked_at else "–" }}</td>{% endif %}</tr>
{% endfor %}</table>
<p class="soft">The shipped model at each site, on its held-out images.{% if judged %} “Right by samples alone”: of these images, those that a small classifier tells the class of which was trained on {{ config["eval.samples"] }} samples and no image;
 “by its own images”: one that the site trained on its own training images. Where the first is higher, the model brings the site something that it has not got.{% endif %}{% if near %}
 A sample is near to an image when it is nearer than the fifth nearest real image of the site, of up to 256 (coverage, Naeem et al. 2020).{% endif %} Only counts left the nodes.</p></div>
{% endif %}
{% if final.audit %}
<h2>Memorization audit</h2>
<div class="card scroll"><table><tr><th>node</th><th class="n">samples near to a training image, of {{ final.audit_samples }}</th><th class="n">by chance</th><th class="n">membership AUC</th></tr>
{% for name, found in final.audit.items() %}<tr><td>{{ name }}</td><td class="n">{{ found.near }}</td><td class="n">{{ "%.1f"|format(found.by_chance or 0) }}</td><td class="n">{{ "%.3f"|format(found.members_auc) }}{% if found.members_auc_error %} ± {{ "%.3f"|format(found.members_auc_error) }}{% endif %}</td></tr>
{% endfor %}</table>
<p class="soft">Each node counted samples that are nearer to one of its training images than 99 % of its held-out images are;
 many more than are so by chance mean copies. The AUC says how well a low loss tells training images from held-out ones: 0.5 is chance, near 1 means that
 who has the model can tell who was in the data. Neither proves that nothing was memorized. Only these figures left the nodes.</p></div>
{% endif %}
{% if final.canaries %}
<h2>Canaries</h2>
<div class="card scroll"><table><tr><th>node</th><th class="n">guesses</th><th class="n">right</th><th class="n">ε at least</th>{% if private %}<th class="n">ε accounted for</th>{% endif %}</tr>
{% for name, found in final.canaries.items() %}<tr><td>{{ name }}</td><td class="n">{{ found.guesses }}</td><td class="n">{{ found.right }}</td><td class="n">{{ "%.2f"|format(found.epsilon_at_least) }}</td>{% if private %}<td class="n">{{ accounted[name] }}</td>{% endif %}</tr>
{% endfor %}</table>
<p class="soft">Each node put about half of {{ config["privacy.canaries"] }} images that it had made up among its own, and guessed from the shipped model's losses which those were.
 Half of the guesses are right by chance. “At least” is what so many right ones prove of any training, with 95 % confidence; it must lie below what was accounted for. 0 proves nothing: a better attack may find more.</p></div>
{% endif %}
{% if faults %}
<h2>Faults survived</h2>
<div class="card"><p>{% for line in faults %}{{ line }}<br>{% endfor %}</p></div>
{% endif %}
{% if nodes %}
<h2>Nodes</h2>
{% macro table(some) %}<div class="scroll"><table><tr><th>node</th><th class="n">images</th><th class="n">held out</th><th class="n">sent</th><th class="n">received</th>{% if private %}<th class="n">ε in this run</th><th class="n">in all runs</th>{% endif %}<th>classes</th></tr>
{% for node in some %}
<tr><td>{{ node.name }}</td><td class="n">{{ node.images }}</td><td class="n">{{ node.held_out }}</td><td class="n">{{ node.up }}</td><td class="n">{{ node.down }}</td>{% if private %}<td class="n">{{ node.spent[0] }}</td><td class="n">{{ node.spent[1] }}</td>{% endif %}
<td><div class="bar">{% for bar in node.bars %}<span title="{{ bar.name }}: {{ bar.count }}" style="width:{{ 100 * bar.share }}%;background:hsl({{ bar.hue }} 60% 55%)"></span>{% endfor %}</div></td></tr>
{% endfor %}
</table></div>{% endmacro %}
<div class="card">{{ table(nodes[:25]) }}
{% if nodes[25:] %}<details><summary>{{ "{:,}".format(nodes[25:]|length) }} more nodes; {{ "{:,}".format(nodes|sum("images")) }} images in all</summary>{{ table(nodes[25:]) }}</details>{% endif %}
{% if hues %}<p class="soft">{% for name, hue in hues.items() %}<span style="color:hsl({{ hue }} 60% 55%)">■</span> {{ name }} {% endfor %}</p>{% endif %}
{% if remarks %}<p>{% for what, counts in remarks.items() %}{{ what }}: {% for name, count in counts[:5] %}{{ "{:,}".format(count) }} at {{ name }}{{ ", " if not loop.last }}{% endfor %}
{% if counts[5:] %} and some at {{ "{:,}".format(counts[5:]|length) }} more nodes{% endif %}<br>{% endfor %}</p>{% endif %}
</div>
{% endif %}
{% if rows %}
<h2>Rounds</h2>
<div class="card scroll"><table><tr>{% for head in ["round", "training loss", "held-out loss at start", "replies", "failed", "bytes up", "bytes down", "lost by coding", "seconds"] %}<th class="n">{{ head }}</th>{% endfor %}</tr>
{% for row in rows %}
<tr><td class="n">{{ row.round }}</td><td class="n">{{ "%.4f"|format(row.train_loss) }}</td><td class="n">{{ "%.4f"|format(row.eval_loss) if row.eval_loss is not none else "–" }}</td>
<td class="n">{{ row.clients_ok }}</td><td class="n">{{ row.clients_failed }}{% for reason, n in row.failures.items() %} {{ n }} {{ reason }}{% endfor %}</td>
<td class="n">{{ "{:,}".format(row.bytes_up) }}</td><td class="n">{{ "{:,}".format(row.bytes_down) }}</td><td class="n">{{ "%.1f %%"|format(100 * row.coding_error) if row.coding_error is number else "–" }}</td><td class="n">{{ "%.1f"|format(row.seconds) }}</td></tr>
{% endfor %}
</table></div>
{% endif %}
<h2>Configuration</h2>
<div class="card"><details><summary>Every key, resolved</summary><div class="scroll"><table>
{% for key, value in config.items() %}<tr><td><code>{{ key }}</code></td><td><code>{{ value }}</code></td></tr>
{% endfor %}</table></div></details>
<details><summary>Command that repeats this run</summary><pre>{{ command }}</pre></details></div>
</main>
<script>
const grids = {{ slides|tojson }}, slider = document.getElementById("slider");
if (slider) slider.addEventListener("input", () => {
  const g = grids[slider.value];
  document.getElementById("round").value = g.round;
  document.getElementById("ema").src = g.ema;
});
</script>
</body>
</html>
"""
)

COMPARISON = (
    _HEAD
    + """<body>
<main>
<h1>{{ name }}</h1>
{% for run in runs %}<p class="legend"><span class="label s{{ loop.index0 % 8 }}">●</span> <b>{{ run.name }}</b> <span class="soft">{{ run.config.strategy }}, {{ run.differs }}</span></p>
{% endfor %}
<h2>Figures</h2>
<div class="card scroll"><table><tr><th>run</th>{% for head in heads %}<th class="n">{{ head }}</th>{% endfor %}</tr>
{% for run in runs %}<tr><td>{{ run.name }}</td>{% for cell in run.cells %}<td class="n">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% for note in notes %}<p class="soft">{{ note }}</p>{% endfor %}</div>
{% if charts %}<h2>Curves</h2>
<div class="row">{% for title, chart in charts %}<div class="card"><h3>{{ title }}</h3>{{ chart }}</div>{% endfor %}</div>{% endif %}
<h2>Samples of the last grids</h2>
<div class="row">{% for run in runs %}{% if run.grid %}<figure class="card"><h3>{{ run.name }}, round {{ run.grid.round }}</h3><img alt="samples of {{ run.name }}" src="{{ run.grid.ema }}"></figure>{% endif %}{% endfor %}</div>
</main>
</body>
</html>
"""
)
