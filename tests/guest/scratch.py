import asyncio, sys, os, time
from duende_ublkd.kernel.ring import Ring
from duende_ublkd.kernel.control import Control
from duende_ublkd.core.model import DevInfo, feature_names
async def main():
    r=Ring(64); c=Control(r)
    print('features', feature_names(await c.features()))
    i=await c.add_device(DevInfo(-1,0,-1,0,1,32,512*1024))
    print(i, os.listdir('/sys/class/ublk-char'), os.stat('/sys/class/ublk-char/ublkc0').st_ino, os.stat('/dev/ublkc0'))
    print(await c.get_device_info(i.dev_id))
    t=time.monotonic()
    rs=await asyncio.gather(*[c.get_device_info(k) for k in range(100)],return_exceptions=True)
    print(time.monotonic()-t, rs[:2], r.stats)
    fd=os.open('/dev/ublkc0',os.O_RDWR|os.O_CLOEXEC)
    await c.delete_device_async(0)
    print(os.fstat(fd).st_nlink, await c.get_device_info(0))
    os.close(fd); t=time.monotonic()
    while True:
        try: await c.get_device_info(0)
        except Exception as e: print(repr(e), str(e)); break
    print('free after', time.monotonic()-t)
    t=time.monotonic(); print(os.path.exists('/proc/sys/kernel/io_uring_disabled'))
    await r.close()
asyncio.run(main())
