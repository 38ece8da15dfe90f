# Runs the host's pip to ask what a program is made of, for the Python that it will run on: the first
# argument is that one's version, the rest are pip's.
#
# pip reads the conditions of dependencies ("only below 3.11") for the Python that it runs on itself,
# and builds what a package names by an address, whatever it is told of wheels. Nothing that a
# package brings may run here, and to build is to start a program: none is started.
import sys

version = sys.argv[1]


def refuse(event, arguments):
    if event in ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "os.spawn", "os.system"):
        # pip asks programs who the host is, and goes on without an answer of this kind.
        raise PermissionError("packages are not built on the host: wheels are needed of all of them")


import runpy
from pip._vendor.packaging import markers

target = dict(
    markers.default_environment(),
    implementation_name="cpython",
    implementation_version=version + ".0",
    os_name="posix",
    platform_machine="x86_64",
    platform_python_implementation="CPython",
    platform_system="Linux",
    python_full_version=version + ".0",
    python_version=version,
    sys_platform="linux",
)
markers.default_environment = lambda: dict(target)
sys.addaudithook(refuse)
sys.argv = ["pip"] + sys.argv[2:]
runpy.run_module("pip", run_name="__main__", alter_sys=True)
