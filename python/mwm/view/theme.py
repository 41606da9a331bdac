"""The style of every page this package writes: light and dark, one column, system typefaces."""

from __future__ import annotations

STYLE = """
:root{--ink:#16191d;--muted:#5d6675;--line:#e2e5ea;--paper:#ffffff;--ground:#f6f7f9;--accent:#0f766e;
--s0:#0f766e;--s1:#d9480f;--s2:#4f46a5;--s3:#8a6d1f;--s4:#7a8699;--warm:#fff6ec;--warmline:#f0b27a}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaed;--muted:#9aa4b2;--line:#2c323b;--paper:#15181d;--ground:#0e1014;--accent:#3cc4b4;
--s0:#3cc4b4;--s1:#ff8a4c;--s2:#9d93f5;--s3:#d9b64f;--s4:#93a0b3;--warm:#271d12;--warmline:#7a4f22}}
*{box-sizing:border-box}
html{background:var(--ground);-webkit-text-size-adjust:100%}
body{margin:0 auto;max-width:1060px;padding:56px 28px 96px;color:var(--ink);
font:16px/1.6 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
header{margin-bottom:28px}
.kicker{margin:0 0 10px;color:var(--accent);font-size:13px;font-weight:600;letter-spacing:.06em;text-transform:uppercase}
h1{margin:0;font-size:clamp(28px,4.4vw,42px);line-height:1.14;letter-spacing:-.02em;font-weight:680;text-wrap:balance}
.lead{max-width:68ch;margin:16px 0 0;color:var(--muted);font-size:18px}
nav ol{display:flex;flex-wrap:wrap;gap:6px 22px;margin:0 0 28px;padding:14px 0;border-block:1px solid var(--line);list-style:none;font-size:14px}
nav a{color:var(--muted);text-decoration:none}
nav a:hover{color:var(--accent);text-decoration:underline}
section{margin:0 0 26px;padding:30px 34px 34px;background:var(--paper);border:1px solid var(--line);border-radius:14px}
h2{display:flex;align-items:baseline;gap:12px;margin:0 0 10px;font-size:22px;line-height:1.3;letter-spacing:-.01em;font-weight:640}
h2 .count{color:var(--accent);font-size:15px;font-variant-numeric:tabular-nums}
p{max-width:74ch;margin:0 0 12px}
code{padding:.1em .35em;border-radius:5px;background:var(--ground);border:1px solid var(--line);font:.88em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{overflow-x:auto;white-space:pre-wrap;margin:8px 0 20px;padding:14px 16px;border-radius:10px;background:var(--ground);border:1px solid var(--line)}
pre code{padding:0;border:0;background:none;font-size:14px}
figure{margin:0}
.plate{margin:22px 0 0}
.plate>figcaption{max-width:80ch;margin-top:12px;color:var(--muted);font-size:14px;line-height:1.5}
.plate>figcaption strong{color:var(--ink);font-weight:600}
.sheet{display:grid;grid-template-columns:repeat(var(--columns),minmax(0,1fr));gap:14px 14px;align-items:start}
.sheet .heading{color:var(--ink);font-size:14px;font-weight:600;line-height:1.3}
.sheet .label{grid-column:1/-1;margin-top:8px;color:var(--muted);font-size:14px}
.sheet figure figcaption{margin-top:6px;color:var(--muted);font-size:13px;line-height:1.4;font-variant-numeric:tabular-nums}
.sheet img,.single{display:block;width:100%;height:auto;border-radius:8px;background:#000}
.single{max-width:100%;background:none}
.chart{display:block;width:100%;height:auto;font-family:inherit;font-variant-numeric:tabular-nums}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:1px;margin:20px 0 0;border:1px solid var(--line);
border-radius:12px;overflow:hidden;background:var(--line)}
.facts div{display:flex;flex-direction:column-reverse;justify-content:flex-end;padding:16px 18px;background:var(--paper)}
.facts dd{margin:0;font-size:26px;line-height:1.2;font-weight:640;letter-spacing:-.01em;font-variant-numeric:tabular-nums}
.facts dt{margin-top:4px;color:var(--muted);font-size:13px;line-height:1.4}
.scroll{overflow-x:auto}
table{min-width:60%;border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums}
th,td{padding:9px 28px 9px 0;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
th{color:var(--muted);font-weight:600}
aside{max-width:80ch;margin:18px 0 0;padding:12px 16px;border-left:3px solid var(--accent);border-radius:0 8px 8px 0;background:var(--ground);font-size:15px}
aside.warning{border-color:var(--warmline);background:var(--warm)}
@media(max-width:640px){body{padding:28px 14px 60px}section{padding:20px 16px 24px}
.sheet{grid-template-columns:repeat(2,minmax(0,1fr))}.sheet .heading{display:none}
.sheet figure[data-heading]::before{content:attr(data-heading);display:block;margin-bottom:4px;font-size:13px;font-weight:600}}
@media print{html{background:#fff}section{break-inside:avoid;border:0;padding:0}nav{display:none}}
"""
