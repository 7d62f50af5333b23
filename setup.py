from configparser import ConfigParser

from setuptools import setup

facts = ConfigParser()
facts.read("settings.ini", encoding="utf-8")
facts = facts["DEFAULT"]
tests = facts["test_requirements"].split()

setup(
    author=facts["author"],
    license=facts["license"],
    python_requires=">=" + facts["min_python"],
    keywords=facts["keywords"].split(),
    install_requires=facts["requirements"].split(),
    extras_require={"test": tests, "dev": tests + facts["dev_requirements"].split(), "docs": facts["docs_requirements"].split()},
    classifiers=["Programming Language :: Python :: 3", "Programming Language :: Python :: 3 :: Only"],
)
