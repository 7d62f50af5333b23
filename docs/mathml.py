"Formulas as MathML, which browsers show without a script"
from docutils import nodes
from latex2mathml.converter import convert

def formula(display):
    def visit(self, node):
        self.body.append(convert(node.astext(), display=display))
        raise nodes.SkipNode
    return visit


def setup(app):
    app.add_html_math_renderer('mathml', (formula('inline'), None), (formula('block'), None))
    return dict(parallel_read_safe=True, parallel_write_safe=True)
