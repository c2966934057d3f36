"""How the report looks: light and dark as the reader's system asks, and on paper."""

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1b1b1b; --soft: #4a4a4a; --rule: #d9d9d9; --link: #005a8c;
  --good: #00664a; --bad: #a33c00; }
@media (prefers-color-scheme: dark) { :root { --paper: #161616; --ink: #e8e8e8; --soft: #b5b5b5; --rule: #3d3d3d;
  --link: #7cc4f0; --good: #4fd1a5; --bad: #ff9d66; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem;
  color: var(--ink); background: var(--paper); }
a { color: var(--link); } a:focus-visible, .wide:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--rule); }
nav ol { columns: 16rem; padding-left: 1.4rem; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .4rem 0; }
th, td { text-align: left; vertical-align: top; padding: .4rem .55rem; border-bottom: 1px solid var(--rule); }
td.number { white-space: nowrap; }
td.claim { min-width: 13rem; } td.reproduced, td.not, td.untested { min-width: 10rem; }
td small { display: block; max-width: 13rem; font-weight: 400; white-space: normal; color: var(--soft); }
.reproduced { color: var(--good); font-weight: 600; }
.not { color: var(--bad); font-weight: 600; }
.untested { color: var(--soft); font-weight: 600; }
figure { margin: 1.5rem 0; } figure img { max-width: 100%; height: auto; background: #ffffff; border-radius: 4px; }
figcaption { color: var(--soft); font-size: .9rem; }
@media print {
  :root { color-scheme: light; --paper: #ffffff; --ink: #000000; --soft: #333333; --rule: #bbbbbb; --link: #000000;
    --good: #00664a; --bad: #a33c00; }
  body { max-width: none; margin: 0; font-size: 10pt; } nav { display: none; }
  .wide { overflow: visible; } table { font-size: 8pt; } td.claim, td.reproduced, td.not, td.untested { min-width: 0; }
  td.number { white-space: normal; } tr, figure { break-inside: avoid; }
  h2 { break-after: avoid; }
}
"""
