"""The page of a run as a jinja2 template: one file, no script, nothing fetched.

It is a module because the bundle that is sent to sites carries only Python under core/.
"""

PAGE = """\
{%- macro interval(e) -%}
{% if e.low is not none %}<span class="interval">[{{ e.low | figure(e) }}, {{ e.high | figure(e) }}]</span>{% endif %}
{%- endmacro -%}
{%- macro image(name, alt) -%}
{% if name in figures %}<figure><img src="{{ figures[name] }}" alt="{{ alt }}"></figure>{% endif %}
{%- endmacro -%}
{%- macro evaluations(rows) -%}
{% if rows %}
<div class="wide"><table>
<thead><tr><th>Stage</th><th>Measure</th><th class="n">Value</th><th>95 % interval</th><th class="n">Subjects scored</th>
<th>Regime</th><th class="n">Seed</th></tr></thead>
<tbody>
{% for e in rows %}
<tr><td>{{ e.stage | stage }}</td><td>{{ e | measure }}</td><td class="n"><b>{{ e.value | figure(e) }}</b></td>
<td>{{ interval(e) or "constant" }}</td><td class="n">{{ e.num_subjects }}</td><td>{{ e.regime }}</td>
<td class="n">{{ e.seed }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endif %}
{%- endmacro -%}
{%- macro pivot(table) -%}
{% if table.rows %}
<div class="wide"><table>
<thead><tr><th>{{ table.first }}</th>{% for column in table.columns %}<th class="n">{{ column }}</th>{% endfor %}</tr></thead>
<tbody>
{% for site, cells in table.rows %}
<tr><td class="name">{% if table.first == "Site" %}{{ dot(site) }}{% endif %}{{ site }}</td>
{% for e in cells %}<td class="n">{% if e %}<b>{{ e.value | figure(e) }}</b><br>{{ interval(e) }}<br>
<span class="interval">n {{ e.num_subjects }}{{ ", unseen" if e.metric.endswith("_unseen") }}</span>
{% else %}—{% endif %}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endif %}
{%- endmacro -%}
{%- macro counts(table) -%}
<div class="wide"><table>
<thead><tr><th>{{ table.first }}</th>{% for column in table.columns %}<th class="n">{{ column }}</th>{% endfor %}</tr></thead>
<tbody>
{% for name, cells in table.rows %}
<tr><td class="name">{{ name }}</td>{% for cell in cells %}<td class="n">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{%- endmacro -%}
{%- macro dot(site) -%}
<span class="dot" style="background:{{ colours[site] }}"></span>
{%- endmacro -%}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ record.name }} · Isocenter</title>
<style>
:root { --ink: #1c2530; --soft: #5d6975; --line: #e2e6ea; --blue: #0072b2; --paper: #fff; --wash: #f6f8f9; }
* { box-sizing: border-box; }
html { background: var(--wash); }
body { margin: 0 auto; max-width: 1080px; padding: 56px 64px 72px; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, "DejaVu Sans", sans-serif;
  overflow-wrap: anywhere; }
h1, h2, .verdict { font-family: Charter, "Iowan Old Style", "Source Serif 4", Georgia, "DejaVu Serif", serif; }
h1 { font-size: 34px; line-height: 1.15; font-weight: 600; margin: 4px 0 0; letter-spacing: -.01em; }
h2 { font-size: 23px; font-weight: 600; margin: 60px 0 10px; padding-top: 14px; border-top: 2px solid var(--ink); }
h3 { font-size: 15px; font-weight: 650; margin: 28px 0 6px; }
p { margin: 0 0 12px; max-width: 76ch; }
.kicker, .soft, figcaption, .interval { color: var(--soft); }
.kicker { font-size: 13px; letter-spacing: .02em; }
.verdict { font-size: 21px; line-height: 1.45; margin: 26px 0 24px; padding-left: 20px; max-width: 62ch;
  border-left: 4px solid var(--blue); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 14px; margin: 0 0 26px; }
.card { border: 1px solid var(--line); border-radius: 6px; padding: 14px 16px 12px; break-inside: avoid; }
.card .what { font-size: 13px; color: var(--soft); }
.card .value { font-size: 30px; font-weight: 600; line-height: 1.25; font-variant-numeric: tabular-nums; }
.card .value .interval { font-size: 14px; font-weight: 400; }
.card .beside { font-size: 13px; }
nav { font-size: 13.5px; line-height: 1.9; } nav a { color: var(--blue); text-decoration: none; margin-right: 18px; }
figure { margin: 14px 0 10px; break-inside: avoid; } figure img { display: block; width: 100%; height: auto; }
figcaption { font-size: 13px; }
.wide { overflow-x: auto; margin: 10px 0 18px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th { text-align: left; font-weight: 600; color: var(--soft); border-bottom: 1px solid var(--ink); vertical-align: bottom; }
th, td { padding: 5px 16px 5px 0; } td { border-bottom: 1px solid var(--line); vertical-align: top; }
th:last-child, td:last-child { padding-right: 0; }
.n { text-align: right; } .name { min-width: 110px; } .interval { white-space: nowrap; font-size: 13px; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 8px; }
.config { columns: 3 260px; column-gap: 32px; font-size: 13px; margin: 8px 0 0; }
.config section { break-inside: avoid; margin: 0 0 14px; } .config h4 { font-size: 13px; margin: 0 0 2px; }
.config dl { display: grid; grid-template-columns: auto minmax(38%, 1fr); gap: 0 12px; margin: 0; }
.config dt { color: var(--soft); } .config dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; }
ul { padding-left: 20px; margin: 4px 0 14px; } li { margin: 3px 0; max-width: 80ch; }
dl.terms { display: grid; grid-template-columns: 190px 1fr; gap: 8px 24px; margin: 8px 0 0; }
dl.terms dt { font-weight: 600; } dl.terms dd { margin: 0; max-width: 70ch; }
footer { margin-top: 56px; padding-top: 12px; border-top: 1px solid var(--line); font-size: 13px; color: var(--soft); }
@media (max-width: 760px) { body { padding: 28px 20px; } dl.terms { grid-template-columns: 1fr; gap: 2px; } }
@media print { @page { margin: 16mm 14mm; } html { background: none; } body { max-width: none; padding: 0; font-size: 9.5pt; }
  table, .config, .config h4 { font-size: 8.2pt; } th, td { padding-right: 10px; } .interval { font-size: 8pt; }
  section > p, dt { break-after: avoid; }
  nav { display: none; } h2 { break-after: avoid; margin-top: 32px; } h3 { break-after: avoid; }
  tr { break-inside: avoid; } thead { display: table-header-group; } .wide { overflow: visible; } }
</style>
</head>
<body>
<header>
<div class="kicker">Isocenter · run report</div>
<h1>{{ record.name }}</h1>
<div class="soft">{{ facts | join(" · ") }}</div>
<p class="verdict">{{ verdict }}</p>
{% if cards %}
<div class="cards">
{% for card in cards %}
<div class="card"><div class="what">{{ card.title }}</div>
<div class="value">{{ card.now.value | figure(card.now) }} {{ interval(card.now) }}</div>
<div class="beside">{{ card.beside or "\u00a0" }}</div></div>
{% endfor %}
</div>
{% endif %}
<nav><a href="#ran">What ran</a> <a href="#losses">Losses</a> <a href="#embeddings">Embeddings</a>
<a href="#site">Site predictability</a> <a href="#age">Age error</a>
<a href="#diagnosis">{{ "Diagnosis" if tuned_title == diagnosis_title else "Fine-tuning" }}</a>
<a href="#sites">By site</a> <a href="#problems">Problems and notes</a> <a href="#reading">How to read</a></nav>
</header>

<section id="ran">
<h2>What ran</h2>
{% if sites %}
<div class="wide"><table>
<thead><tr><th>Site</th><th>Role</th><th class="n">Subjects</th><th class="n">Scans</th><th>Scanners</th><th>Ages</th>
<th>Problems</th></tr></thead>
<tbody>
{% for site in sites %}
<tr><td class="name">{{ dot(site.name) }}{{ site.name }}</td><td>{{ site.role }}</td><td class="n">{{ site.subjects }}</td>
<td class="n">{{ site.scans }}</td><td>{{ site.scanners }}</td><td>{{ site.ages }}</td><td>{{ site.problems }}</td></tr>
{% endfor %}
</tbody></table></div>
{% else %}<p>No site described itself.</p>{% endif %}
{% if traffic %}
<h3>What crossed the wire</h3>
<p>Bytes of arrays between the server and all sites together; headers, names and encryption come on top.</p>
<div class="wide"><table>
<thead><tr><th>What</th><th class="n">To sites</th><th class="n">From sites</th></tr></thead>
<tbody>
{% for what, to_sites, from_sites in traffic %}
<tr><td>{{ what }}</td><td class="n">{{ to_sites }}</td><td class="n">{{ from_sites }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endif %}
<h3>Configuration</h3>
{% if config %}
<div class="config">
{% for group, entries in config %}
<section><h4>{{ group }}</h4><dl>{% for key, value in entries %}<dt>{{ key }}</dt><dd>{{ value }}</dd>{% endfor %}</dl></section>
{% endfor %}
</div>
{% else %}<p>No configuration was recorded.</p>{% endif %}
</section>

<section id="losses">
<h2>Loss curves by site</h2>
{% if "losses_pretraining" in figures or "losses_finetuning" in figures %}
<p>Mean loss over a site's local steps in each round, before averaging. Colours and markers mean the same site throughout
this page.</p>
{{ image("losses_pretraining", "Loss of each site by round of pretraining") }}
{{ image("losses_finetuning", "Loss of each target site by round of fine-tuning") }}
{% else %}<p>No round was completed.</p>{% endif %}
</section>

<section id="embeddings">
<h2>Embeddings</h2>
{% if "embeddings" in figures %}
<p>Each point is a scan, placed by t-SNE on its z-scored representation; held-out test subjects are large, the others small
and pale. A good encoder mixes the sites (left) and orders the ages (middle). Distances between groups and the size of a
group mean little in such a map: the figures below decide.</p>
{{ image("embeddings", "Two-dimensional maps of the representations by stage, coloured by site, age and diagnosis") }}
{% else %}<p>No representation was shared with the server, so there is no map. The notes below say why.</p>{% endif %}
{% for text in map_notes %}<p class="soft">{{ text }}</p>{% endfor %}
</section>

<section id="site">
<h2>Site predictability, before and after</h2>
{% if site_rows %}
<p>How well a probe tells from the representation which site (or scanner) a held-out healthy subject comes from. Lower is
better, down to the floor: what age and sex alone give away.</p>
{{ image("site_predictability", "Balanced accuracy of predicting site and scanner, by stage, with chance and floor") }}
{{ evaluations(site_rows) }}
{% else %}<p>Site predictability was not evaluated. The notes below say why.</p>{% endif %}
</section>

<section id="age">
<h2>Age error</h2>
{% if age_rows %}
<p>How far a ridge regression on the representation is from the age of held-out healthy subjects. Lower is better: removing
the site should not cost the anatomy.</p>
{{ image("age_error", "Mean absolute error of age, by stage and by site") }}
{{ evaluations(age_rows) }}
{% else %}<p>Age was not evaluated. The notes below say why.</p>{% endif %}
</section>

<section id="diagnosis">
<h2>{{ tuned_title }}</h2>
{% if tuned_rows %}
{% if tuned_title == diagnosis_title %}
<p>How well patients are told from controls among held-out subjects of the target sites: by a probe on the frozen
representation, and by classifiers fine-tuned across sites. Higher is better; 0.5 is a coin.</p>
{% else %}
<p>What fine-tuned models tell of held-out subjects of the sites they were trained at, the scans of a subject averaged. Of an
AUC higher is better and 0.5 is a coin; of an error lower is better.</p>
{% endif %}
{{ image("diagnosis_auc", "Area under the ROC curve of diagnosis, by stage") }}
{% for name in tuned_figures %}{{ image(name, "Area under the ROC curve or mean absolute error, by stage and by site") }}
{% endfor %}
{{ evaluations(tuned_rows) }}
{% elif tuned_title == diagnosis_title %}<p>Diagnosis was not evaluated. The notes below say why.</p>
{% else %}<p>It was not evaluated. The notes below say why.</p>{% endif %}
{{ image("predictions", "By stage: the ROC curve with the operating point and how often scores come true, or predicted against
true") }}
{% if confusions %}
<h3>What held-out subjects are taken for</h3>
<p>Numbers of subjects. Of two classes the second is told from the score on that separates validation subjects best.</p>
{% for table in confusions %}{{ counts(table) }}{% endfor %}
{% endif %}
{% for table in details %}<h3>{{ table.title }}</h3>{{ pivot(table) }}{% endfor %}
{% if other_rows %}<h3>Other tasks</h3>{{ evaluations(other_rows) }}{% endif %}
</section>

<section id="sites">
<h2>By site</h2>
{% for table in pivots %}<h3>{{ table.title }}</h3>{{ pivot(table) }}{% else %}
<p>No figure was evaluated at a single site.</p>{% endfor %}
</section>

<section id="problems">
<h2>Problems and notes</h2>
{% if problems %}<h3>Problems</h3><ul>{% for text in problems %}<li>{{ text }}</li>{% endfor %}</ul>
{% else %}<p>No problem was reported.</p>{% endif %}
{% if record.notes %}<h3>Notes</h3><ul>{% for text in record.notes %}<li>{{ text }}</li>{% endfor %}</ul>{% endif %}
</section>

<section id="reading">
<h2>How to read this page</h2>
<dl class="terms">
<dt>Stage</dt><dd>What was evaluated. Probes: raw voxels after PCA, the untrained encoder, the pretrained encoder, all frozen.
Fine-tuning: a linear probe on the frozen encoder, full fine-tuning of it, and the same network trained from scratch.</dd>
<dt>Balanced accuracy</dt><dd>The mean over sites of the share of that site's scans that are recognised, so a large site counts
as much as a small one. A linear probe, and 10 nearest neighbours and boosted trees, because a representation can hide the site
from a linear probe alone. "Among held-out": cross-validated over test subjects only, because what was fitted on train subjects
can hide the site in them and not in others; fewer scans fit these probes, so compare them with their own floor.</dd>
<dt>Chance</dt><dd>1 / number of sites: the balanced accuracy of a probe that knows nothing.</dd>
<dt>Floor</dt><dd>The balanced accuracy of a probe given only age and sex, of each probe its own; the
figure shows that of the linear one. Hospitals see people of different ages, so a
representation that keeps age cannot be expected below it; reaching chance would mean that age was lost too. The
page calls a figure above or below the floor when its interval excludes the floor's value, or chance where the floor came
out below it.</dd>
<dt>Held-out subject</dt><dd>Of the test split: no scan of that subject was used to train the encoder, a classifier or a
probe.</dd>
<dt>Unseen site</dt><dd>A site that took no part in pretraining, nor in fitting the age probe.</dd>
<dt>Interval</dt><dd>95 % percentile interval over resamples of the test subjects, each with all its scans. It covers other
subjects of these sites; it does not cover another training run, another seed or another hospital.</dd>
<dt>MAE, R²</dt><dd>Mean absolute error in years; the share of the variance of age that is explained.</dd>
<dt>Bias, slope</dt><dd>Mean of predicted minus true age; how much the predicted age grows in a year: below 1, the old are taken
for too young and the young for too old.</dd>
<dt>Site left out of the fit</dt><dd>Each test subject is scored by an age probe fitted at the other sites.</dd>
<dt>Sites mixed</dt><dd>iLISI: how many sites there are, in effect, among the nearest neighbours of a held-out subject; as a
share, 1 is what neighbours drawn at random would give.</dd>
<dt>MMD², variance explained</dt><dd>The squared distance between the distributions of two sites, mean over pairs; the share
of the variance of the representation that site explains beyond age and sex, or age beyond site and sex. Both are about 0,
and may be negative, where there is no effect.</dd>
<dt>AUC</dt><dd>The chance that a random patient is ranked above a random control. Only sites that have both take part.</dd>
{% if details %}
<dt>Operating point</dt><dd>The score from which on a finding is told: the one at which sensitivity (the share of those who have
it that are told) plus specificity (the share of the others that are not) is largest among validation subjects. Accuracy, balanced
accuracy, sensitivity and specificity of a fine-tuned model of two classes are at that score.</dd>
<dt>Calibration</dt><dd>Whether of the subjects with a predicted probability of 0.7 about 70 % have it. Brier score: the mean
squared distance of probability and truth, lower is better. Calibration error: the mean distance in ten groups of subjects by
score, which few subjects make too large. Slope of true on predicted: 1 is calibrated, below 1 predictions are too extreme. A
point of the figure is of five subjects or more.</dd>
{% endif %}
<dt>From sums</dt><dd>Probes that sites fit together without sharing a scan, on a few directions of the representation, which the
notes name: ridge regression from moments, linear discriminants from class means and a covariance (or logistic regression from
gradients), and the nearest class mean. They are weaker than probes of all of it: compare them with their own floor. Errors are
counted at the sites, which withhold what is of too few subjects; counts are rounded. Intervals are in closed form: normal for
errors, Wilson's for recalls, DeLong's for an AUC, widened by what its histogram may hide.</dd>
<dt>No claim</dt><dd>A low site predictability says that these probes fail on these sites, not that no probe can succeed, and
nothing about privacy. An AUC here is no measure of use in a clinic. One run with one seed does not rank two methods; when
intervals overlap, take the difference as open.</dd>
</dl>
</section>
<footer>Isocenter {{ version }}. The numbers are in metrics.json, the losses in rounds.jsonl, the figures in figures/.</footer>
</body>
</html>
"""
