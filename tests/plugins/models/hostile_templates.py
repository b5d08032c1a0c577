"""Templates that want to loop for ever, fill the memory, or reach what is not theirs; and a program that tries them.

Run as a program: reads templates from standard input and says what came of each, how many seconds it took and by how
many MiB the process grew, within a limit on its address space.
"""

# ruff: noqa: E501

DOUBLE = "{% set ns = namespace(x=START) %}{% for i in range(99) %}{% set ns.x = STEP %}{% endfor %}"


def doubling(start: str, step: str, then: str = "") -> str:
    return DOUBLE.replace("START", start).replace("STEP", step) + then


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}BODY{% endfor %}{% endfor %}"
BIG = "{% set s = 'ab' * 2000000 %}"
WIDE = "{% set s = '\U0001f600' * 2000000 %}"

THROUGH = (
    "max", "min", "selectattr('x') | list", "reject | list", "map('upper') | list", "title", "join", "batch(2) | list",
    "sort", "groupby('x')", "list",
)  # fmt: skip

ENDLESS = {
    "loops in loops": LOOP.replace("BODY", ""),
    "loops that write": LOOP.replace("BODY", "a"),
    "loops that write into a block": "{% set x %}"
    + LOOP.replace("BODY", "a{{ b }}b{% if b %}{% endif %}c")
    + "{% endset %}",
    "loops over a filter": "{% for a in range(99999) %}{% for b in range(99999) if 'ab' in 'xyz' * a %}{% endfor %}{% endfor %}",
    "loops over nothing that passes": "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "loops through filters": "{% for a in range(99999) %}{{ range(99999) | map('string') | list | length }}{% endfor %}",
    "loops through tests": BIG + "{{ range(99999) | map('string') | select('eq', s) | list }}" * 50,
    "a recursive loop": "{% for x in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "a macro that calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a macro that calls itself twice": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "a block that calls itself": "{% block b %}{{ self.b() }}{{ self.b() }}{% endblock %}",
    "a callers' circle": "{% macro m() %}{% call m() %}{{ caller() }}{% endcall %}{% endmacro %}{{ m() }}",
    "a power": "{{ 9 ** 9 ** 9 }}",
    "a product of powers": doubling("3", "ns.x * ns.x"),
    "a rounded number": "{{ 1.5 | round(1000000000, 'ceil') }}",
    "a search from the end": "{% set s = 'a' * 4000000 %}{{ s.rfind('b' + 'a' * 2000000) }}",
    "a strip of many": "{% set s = 'a' * 4000000 %}{{ s.strip('b' * 4000000 + 'a') }}",
    "a strip of many looked for slowly": "{{ ('ā' * 900000).strip('ȁ̀ЁԁĀ' * 1900 ~ 'ā') }}",
    "parts searched for from the end": "{{ ('a' * 1000000).rsplit('b' + 'a' * 500000) }}",
    "a macro without end": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "comparisons of what is nested": doubling("[1]", "[ns.x, ns.x]", "{{ ns.x == ns.x }}"),
    "comparisons of long lists": "{% set a = range(99999) | list * 9 %}{% set b = range(99999) | list * 9 %}"
    + "{{ a == b }}" * 4000,
    "a deep list": "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
}

LARGE = {
    "a text times a number": "{{ 'a' * 10000000000 }}",
    "a list times a number": "{{ ([1] * 1000000000) | length }}",
    "a list of a list": "{{ [[1] * 1000000] * 1000000 }}",
    "doubled by plus": doubling("'a'", "ns.x + ns.x"),
    "doubled by tilde": doubling("'a'", "ns.x ~ ns.x"),
    "doubled by join": doubling("'a'", "[ns.x, ns.x] | join"),
    "doubled by a method": doubling("'a'", "''.join([ns.x, ns.x])"),
    "doubled by replace": doubling("'a'", "ns.x | replace('a', 'aa')"),
    "doubled by a method replace": doubling("'a'", "ns.x.replace('a', 'aa')"),
    "doubled by percent": doubling("'a'", "'%s%s' % (ns.x, ns.x)"),
    "doubled by format": doubling("'a'", "'{0}{0}'.format(ns.x)"),
    "doubled by a filter": doubling("'a'", "'%s%s' | format(ns.x, ns.x)"),
    "doubled in a list": doubling("[1]", "ns.x + ns.x"),
    "nested in lists": doubling("[1]", "[ns.x, ns.x]", "{{ ns.x }}"),
    "nested in dictionaries": doubling("1", "{'a': ns.x, 'b': ns.x}", "{{ ns.x | tojson }}"),
    "nested in calls": doubling("1", "dict(a=ns.x, b=ns.x)", "{{ ns.x | tojson }}"),
    "nested in arguments": "{% set ns = namespace(x=1) %}{% macro m() %}{% set ns.x = varargs %}{% endmacro %}"
    "{% for i in range(99) %}{{ m(ns.x, ns.x) }}{% endfor %}{{ ns.x }}",
    "nested in a cycler": doubling("1", "cycler(ns.x, ns.x).items", "{{ ns.x.y.z }}"),
    "escaped": "{{ ('<' * 30000000) | e }}" * 3,
    "centred": "{{ 'a' | center(1000000000) }}",
    "centred by a method": "{{ 'a'.center(1000000000) }}",
    "filled with noughts": "{{ 'a'.zfill(1000000000) }}",
    "indented": "{{ ('a\n' * 1000000) | indent(10000) }}",
    "indented by a text": BIG + "{{ 'a\nb\nc' | indent(s) | indent(s) | indent(s) | length }}",
    "padded by percent": "{{ '%1000000000d' % 1 }}",
    "padded by percent and star": "{{ '%*d' % (1000000000, 1) }}",
    "padded by format": "{{ '{:1000000000}'.format(1) }}",
    "padded by a nested format": "{{ '{:{}}'.format(1, 1000000000) }}",
    "a batch filled up": "{{ [1] | batch(1000000000, 'a') | list }}",
    "slices": "{{ [1] | slice(1000000000) | list }}",
    "a long range": "{{ range(10000000000) | list }}",
    "joined by what is long": BIG + "{{ range(99999) | join(s) }}",
    "joined by a method": BIG + "{{ s.join(['a'] * 99999) }}",
    "split into words": BIG + "{{ (s.replace('a', ' ') * 9).split() | length }}",
    "split into lines": "{{ ('a\n\n' * 20000000).splitlines() | length }}",
    "split into characters": WIDE + "{{ s | list | length }}",
    "sorted characters": WIDE + "{{ s | sort | length }}",
    "title": WIDE + "{{ (s * 6) | title | length }}",
    "copies in a list": BIG + "{% set ns = namespace(x=[]) %}{% for i in range(9999) %}"
    "{% set ns.x = ns.x + [s[i:]] %}{% endfor %}",
    "copies by a filter": BIG + "{{ range(99999) | map('replace', '', s) | list | length }}",
    "written again and again": BIG + "{% for i in range(99999) %}{{ s }}{% endfor %}",
    "written wide": BIG + "{% for i in range(25) %}{{ s }}{% endfor %}\U0001f600",
    "JSON with blanks": "{{ [[[[1] * 1000] * 9] * 9] | tojson(indent=1000000) }}",
    "JSON with separators": "{{ ([1] * 1000000) | tojson(separators=('a' * 1000000, 'b')) }}",
    "JSON of escapes": WIDE + "{{ (s * 4) | tojson(ensure_ascii=true) | length }}",
    "the words for a list": "{{ (['\\x00' * 1000000] * 60) | string | length }}",
    **{f"characters through {one}": f"{{{{ ('a' * 4000000) | {one} }}}}" for one in THROUGH},
    **{f"letters by {one}": f"{{{{ ('ā' * 1500000).{one}() }}}}" for one in ("upper", "casefold", "swapcase", "title")},
    "characters joined": "{{ ''.join('a' * 4000000) }}",
    "characters as arguments": "{% macro m() %}{{ varargs | length }}{% endmacro %}{{ m(*('a' * 4000000)) }}",
    "characters to a cycler": "{{ cycler(*('a' * 4000000)) }}",
    "characters to a filter": "{{ [1] | map(*('a' * 4000000)) }}",
    "characters of a loop": "{% for c in 'a' * 4000000 if c %}{{ loop.length }}{% endfor %}",
    "characters of a recursive loop": "{% for c in [1] recursive %}{{ loop('a' * 4000000) }}{% endfor %}",
    "characters of a named recursive loop": "{% for c in [1] recursive %}{{ loop(iterable='a' * 4000000) }}{% endfor %}",
    "padded behind a key": "{{ '%(a(b)c)2000000000d' % {'a(b)c': 1} }}",
    "padded behind a key by a filter": "{{ '%(a(b)c)2000000000d' | format(**{'a(b)c': 1}) }}",
    "a list in a filter": "{{ [[1] * 3000000, [2] * 3000000] | sum(start=[]) }}",
    "a huge text": "{# " + "a" * 2_000_000 + " #}",
    "a huge number": "{{ " + "9" * 100_000 + " }}",
    "deep parentheses": "{{ " + "(" * 50_000 + ")" * 50_000 + " }}",
    "a long sum": "{{ 1" + " + 1" * 30_000 + " }}",
}

COMPILING = {
    "many outputs": "{{a}}" * 26_000,
    "many conditions": "{% if a %}b{% endif %}" * 5_900,
    "many additions": "{{a~a~a~a}}" * 11_000,
    "many lists": "{{" + "[1]," * 30_000 + "}}",
    "many alternatives": "{%if a%}" + "{%elif a%}" * 11_000 + "{%endif%}",
    "nested loops": "{%for a in b%}" * 3_000 + "{%endfor%}" * 3_000,
    "a chain of filters": "{{a" + "|e" * 60_000 + "}}",
    "comments without an end": "{#" * 60_000,
    "many macros": "{%macro a()%}{%endmacro%}" * 4_900 + "{{ a.b.c }}",
    "many blocks": "".join(f"{{%block b{i}%}}{{%endblock%}}" for i in range(3_500)) + "{{ a.b.c }}",
    "many variables": "".join(f"{{% set v{i} = {i} %}}" for i in range(6_000)) + "{{ a.b.c }}",
}

REACHING = {
    "classes": "{{ ''.__class__.__mro__ }}",
    "classes by key": "{{ ''['__class__']['__mro__'] }}",
    "classes by filter": "{{ (''|attr('__class__'))|attr('__mro__') }}",
    "classes by map": "{{ [''] | map(attribute='__class__.__mro__') | list | first }}",
    "subclasses": "{{ [].__class__.__base__.__subclasses__() }}",
    "globals of a cycler": "{{ cycler.__init__.__globals__ }}",
    "globals of lipsum": "{{ lipsum.__globals__['os'].system('touch MARK') }}",
    "globals of a joiner": "{{ joiner.__init__.__globals__.os.system('touch MARK') }}",
    "globals of a namespace": "{{ namespace.__init__.__globals__ }}",
    "a function's code": "{{ raise_exception.__code__ }}",
    "the environment": "{{ self._TemplateReference__context.environment }}",
    "a loop's frame": "{% for x in [1] %}{{ loop._iterator.gi_frame.f_globals }}{% endfor %}",
    "a generator's frame": "{{ ([1] | map('string')).gi_frame.f_builtins }}",
    "formatting": "{{ '{0.__class__.__mro__}'.format('') }}",
    "formatting a map": "{{ '{x.__class__.__mro__}'.format_map({'x': ''}) }}",
    "formatting by a filter": "{{ ['{0.__class__.__mro__}'] | map('format', '') | list }}{{ ''.format.__self__.__class__.__mro__ }}",
    "a namespace's names": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "including": "{% include '/etc/passwd' %}",
    "importing": "{% import 'os' as os %}{{ os.system('touch MARK') }}",
    "importing from": "{% from 'os' import system %}{{ system('touch MARK') }}",
    "extending": "{% extends '/etc/passwd' %}",
    "changing the messages": "{{ messages.append(1) }}",
    "changing a message": "{{ messages[0].update({'role': 'assistant'}) }}",
}

if __name__ == "__main__":
    import json
    import resource
    import sys
    import threading
    import time

    from loomtune.errors import UserError
    from loomtune_plugins.models import templates, templates_rendering

    def size(field: str) -> int:
        lines = open("/proc/self/status").read().splitlines()  # noqa: SIM115, PTH123
        return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) // 1024

    def tried(template: str) -> str:
        messages = [{"role": "user", "content": "Hello"}]
        try:
            return "wrote " + templates.render(template, messages, None, reply=True, special={})[:60]
        except UserError as error:
            return f"refused {error.faults[0].what[:300]}"

    hostile = json.load(sys.stdin)
    assert templates_rendering.rendering("a")
    limit = (size("VmSize") + int(sys.argv[1])) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for name, template in hostile.items():
        open("/proc/self/clear_refs", "w").write("5")  # noqa: SIM115, PTH123 - forget the largest size so far
        begun, before, said = time.monotonic(), size("VmRSS"), list[str]()
        thread = threading.Thread(target=lambda: said.append(tried(template)))  # noqa: B023
        thread.start()
        thread.join()
        grown = size("VmHWM") - before
        print(json.dumps([name, said[0], round(time.monotonic() - begun, 2), grown]), flush=True)
